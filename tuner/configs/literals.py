"""Read and replace the literal settings at the top of a recipe, leaving comments and layout alone."""

import ast
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

KINDS: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "None": type(None),
}
EXAMPLES = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": 'a list such as ["a", "b"]',
    "tuple": "values in brackets such as (0.9, 0.95)",
    "dict": 'a dict such as {"a": 1}',
    "None": "None",
}


class Setting(NamedTuple):
    """One literal of a recipe: `name = value`, and where the value stands in the UTF-8 bytes of the source."""

    name: str
    value: object
    kinds: tuple[str, ...]
    start: int
    end: int
    line: int


def parse(source: str, filename: str) -> ast.Module:
    """The syntax tree; a mistake in it becomes a UserError with file, line and what is wrong."""
    try:
        return ast.parse(source, filename)
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise UserError(f"{filename}:{error.lineno}: {error.msg}" + (f": {text}" if text else "")) from error
    except ValueError as error:  # a null byte
        raise UserError(f"{filename} is not a Python file: {error}") from error


def assignments(tree: ast.Module) -> list[tuple[str, ast.expr, ast.expr | None]]:
    """(name, value, annotation) of each plain assignment at the top level, in order."""
    found: list[tuple[str, ast.expr, ast.expr | None]] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found += [(target.id, node.value, None) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.append((node.target.id, node.value, node.annotation))
    return found


def settings(source: str, filename: str = "config") -> dict[str, Setting]:
    """The literals assigned at the top level, by name; names that are assigned twice are no settings."""
    data = source.encode()
    # ast counts columns in UTF-8 bytes, and ends lines where bytes.splitlines does (str.splitlines knows more ends)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = assignments(parse(source, filename))
    names = [name for name, _, _ in found]
    result = {}
    for name, node, annotation in found:
        try:
            value = ast.literal_eval(node)
        except ValueError:  # computed, hence derived
            continue
        if names.count(name) == 1:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            result[name] = Setting(name, value, kinds_of(value, annotation), start, end, node.lineno)
    return result


def kinds_of(value: object, annotation: ast.expr | None) -> tuple[str, ...]:
    """Which types a setting may have: those of its annotation, else that of its default; () is any."""
    if annotation is not None:
        names = outer_names(annotation)
        return tuple(kind for kind in KINDS if kind in names)
    return () if value is None else (type(value).__name__,)


def outer_names(annotation: ast.expr) -> list[str]:
    """The names of a union such as `str | list[str] | None`, without what stands in square brackets."""
    if isinstance(annotation, ast.BinOp):
        return outer_names(annotation.left) + outer_names(annotation.right)
    return [ast.unparse(annotation.value if isinstance(annotation, ast.Subscript) else annotation)]


def read_value(text: str) -> object:
    """A Python literal, or the text itself where it is none: `1e-5` -> 0.00001, `bf16` -> "bf16"."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def fit(setting: Setting, given: object) -> object:
    """`given` as a value of the setting's type; text is read as on the command line. Wrong type -> UserError."""
    value = read_value(given) if isinstance(given, str) else given
    if not setting.kinds:
        return value
    if "bool" in setting.kinds and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in setting.kinds:
        fitted = convert(value, kind)
        if type(fitted) is KINDS[kind] and same_elements(fitted, setting.value):
            return fitted
    if "str" in setting.kinds and isinstance(given, str):
        return given  # such as data_path=2024, which reads as a number and is meant as text
    allowed = " or ".join(EXAMPLES[kind] for kind in setting.kinds)
    came = f"a {type(value).__name__} came" if value is not None else "None came"
    raise UserError(f"{setting.name}={given}: {came}, allowed is {allowed}; it is {setting.value!r} now.")


def convert(value: object, kind: str) -> object:
    """Changes of type that lose nothing: int to float, list to tuple and back."""
    if kind == "float" and type(value) is int:
        return float(value)
    if kind == "int" and type(value) is float and value.is_integer():
        return int(value)  # 1e4 is how people write 10000
    if kind == "tuple" and isinstance(value, list):
        return tuple(value)
    if kind == "list" and isinstance(value, tuple):
        return list(value)
    return value


def same_elements(value: object, default: object) -> bool:
    """Whether the elements of a list or tuple are of the types that the default's elements have."""
    if not isinstance(value, (list, tuple)) or not isinstance(default, (list, tuple)) or not default:
        return True
    types = {type(element) for element in default}
    return all(type(element) in types or (type(element) is int and float in types) for element in value)


def write(value: object) -> str:
    """Source text of a literal, with double quotes as in the recipes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is not a number that a config can hold; give a finite one.")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if value.isprintable() else repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(write(element) for element in value) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(write(element) for element in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {write(element)}" for key, element in value.items()) + "}"
    return repr(value)


def replace(source: str, values: Mapping[str, object], filename: str = "config") -> str:
    """The source with the literals of the named settings replaced; every other byte stays.

    Raises:
        UserError: an unknown setting (with the nearest names), one that is computed, or a value of a wrong type.
    """
    known = settings(source, filename)
    for name in values:
        if name not in known:
            raise UserError(explain_unknown(name, source, filename, known))
    data = source.encode()
    for name in sorted(values, key=lambda name: known[name].start, reverse=True):  # from the end: spans stay valid
        setting = known[name]
        data = data[: setting.start] + write(fit(setting, values[name])).encode() + data[setting.end :]
    return data.decode()


def explain_unknown(name: str, source: str, filename: str, known: Mapping[str, Setting]) -> str:
    """Why `name` cannot be set in this file."""
    assigned = [assigned for assigned, _, _ in assignments(parse(source, filename))]
    if assigned.count(name) > 1:
        return f"{name} is assigned {assigned.count(name)} times in {filename}: which one is meant? Edit the file."
    if name in assigned:
        return f"{name} is computed in {filename} and follows the settings. Set one of: {', '.join(known)}."
    return f"Unknown setting {name} in {filename}.{did_you_mean_or_all(name, known)}"
