"""A value against a JSON schema, as far as function schemas use it: what is wrong and where, in words."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from tuner.dataset.messages import dump
from tuner.nearest import nearest

Schema = Mapping[str, Any]
MAX_DEPTH = 32  # a schema may refer to itself


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "number": _is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
OTHER_NAMES = {"dict": "object", "list": "array", "tuple": "array", "str": "string", "int": "integer"}
OTHER_NAMES |= {"float": "number", "double": "number", "bool": "boolean", "none": "null"}


def mismatches(value: Any, schema: Any, path: str = "", root: Schema | None = None, depth: int = 0) -> Iterator[str]:
    """What keeps the value from fitting; keywords and types that are not known are taken as met."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return
    root = schema if root is None else root
    if "$ref" in schema:
        yield from mismatches(value, _referred(str(schema["$ref"]), root), path, root, depth + 1)
        return
    name = path or "the arguments"
    wrong_type = _type_mismatch(value, schema)
    if wrong_type:
        yield f"{name} must be {wrong_type}, got {_shown(value)}"
        return
    yield from (f"{name} {problem}" for problem in chain(_choice(value, schema), _limits(value, schema)))
    yield from _inside(value, schema, path, root, depth)
    for keyword in ("anyOf", "oneOf"):
        options = schema.get(keyword) or []
        if options and all(any(mismatches(value, option, path, root, depth + 1)) for option in options):
            yield f"{name} fits none of the {len(options)} forms of {keyword}, got {_shown(value)}"
    for part in schema.get("allOf") or []:
        yield from mismatches(value, part, path, root, depth + 1)


def unknown_names(value: Any, schema: Any) -> list[str]:
    """The arguments that the schema does not name, each with the nearest that it does name; none if it allows any."""
    if not isinstance(schema, Mapping) or not isinstance(value, dict) or schema.get("additionalProperties"):
        return []
    known = schema.get("properties")
    if not isinstance(known, Mapping) or any(keyword in schema for keyword in ("$ref", "anyOf", "oneOf", "allOf")):
        return []
    return [f"{name!r}.{nearest(name, known) or f' Declared: {sorted(known)}.'}" for name in value if name not in known]


def _type_mismatch(value: Any, schema: Schema) -> str:
    """The types that are asked for, if the value has none of them."""
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    names = [OTHER_NAMES.get(str(name).lower(), str(name).lower()) for name in names]
    if not names or any(name not in TYPES for name in names) or (value is None and schema.get("nullable")):
        return ""
    return "" if any(TYPES[name](value) for name in names) else " or ".join(names)


def _choice(value: Any, schema: Schema) -> Iterator[str]:
    allowed = schema.get("enum")
    if isinstance(allowed, list) and allowed and not any(_equal(value, option) for option in allowed):
        yield f"must be one of {_shown(allowed)}, got {_shown(value)}"
    if "const" in schema and not _equal(value, schema["const"]):
        yield f"must be {_shown(schema['const'])}, got {_shown(value)}"


def _equal(value: Any, option: Any) -> bool:
    """Equality of JSON, in which true is not 1."""
    return value == option and isinstance(value, bool) == isinstance(option, bool)


LIMITS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("minimum", "at least", lambda value, limit: value >= limit),
    ("maximum", "at most", lambda value, limit: value <= limit),
    ("exclusiveMinimum", "more than", lambda value, limit: value > limit),
    ("exclusiveMaximum", "less than", lambda value, limit: value < limit),
)
SIZES = (("Length", str, "characters"), ("Items", list, "items"))


def _limits(value: Any, schema: Schema) -> Iterator[str]:
    for keyword, words, holds in LIMITS if _is_number(value) else ():
        if _is_number(schema.get(keyword)) and not holds(value, schema[keyword]):
            yield f"must be {words} {schema[keyword]}, got {_shown(value)}"
    for ending, kind, unit in SIZES if isinstance(value, str | list) else ():
        low, high = schema.get(f"min{ending}", 0), schema.get(f"max{ending}", math.inf)
        if isinstance(value, kind) and _is_number(low) and len(value) < low:
            yield f"must have at least {low} {unit}, got {_shown(value)}"
        if isinstance(value, kind) and _is_number(high) and len(value) > high:
            yield f"must have at most {high} {unit}, got {len(value)}"
    pattern = schema.get("pattern")
    if isinstance(value, str) and isinstance(pattern, str) and _differs(pattern, value):
        yield f"must match the pattern {pattern!r}, got {_shown(value)}"


def _differs(pattern: str, value: str) -> bool:
    """Whether a short text fails a pattern; what Python cannot compile, and long texts, pass."""
    try:
        return len(value) <= 256 and re.search(pattern, value) is None
    except re.error:
        return False


def _inside(value: Any, schema: Schema, path: str, root: Schema, depth: int) -> Iterator[str]:
    """Mismatches in the fields of an object and the items of an array."""
    if isinstance(value, dict):
        required = schema.get("required")
        for name in required if isinstance(required, list) else []:
            if name not in value:
                yield f"{_joined(path, str(name))} is required and missing"
        known = schema.get("properties")
        for name, part in known.items() if isinstance(known, Mapping) else []:
            if name in value:
                yield from mismatches(value[name], part, _joined(path, name), root, depth + 1)
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for place, item in enumerate(value):
            yield from mismatches(item, schema["items"], f"{path or 'the arguments'}[{place}]", root, depth + 1)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else repr(name)


def _referred(reference: str, root: Schema) -> Any:
    """What `#/$defs/name` points to; nothing for other files and broken pointers."""
    node: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _shown(value: Any) -> str:
    words = dump(value)
    return words if len(words) <= 80 else words[:77] + "..."
