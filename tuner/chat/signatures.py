"""The schema of a Python function from its signature and docstring, as models are told of tools."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from tuner.errors import UserError

SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    list: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    Any: {},
    inspect.Parameter.empty: {},
}
ARGUMENTS = re.compile(r"^\s*(?:Args|Arguments|Parameters):\s*$")
SECTION = re.compile(r"^\s*[A-Z]\w*:\s*$")
ARGUMENT = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """An OpenAI function schema: types from annotations, descriptions from a docstring with an `Args:` section.

    Raises:
        UserError: a parameter that no JSON object can give by name, or a type that JSON has not.
    """
    name = function.__name__
    said, about = read_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"{name}(): {parameter} cannot be given by name. Use plain parameters, or begin its name "
                            "with _ to keep it from the model.")  # fmt: skip
        schema = type_schema(hints.get(parameter.name, parameter.annotation), f"{name}({parameter.name})")
        if parameter.name in about:
            schema = {**schema, "description": about[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": said, "parameters": parameters}}


def type_schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type; `where` it stands is for the error."""
    if isinstance(hint, typing.Hashable) and hint in SIMPLE:
        return dict(SIMPLE[hint])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        options = [type_schema(option, where) for option in inner]
        if all(list(option) == ["type"] for option in options):
            return {"type": [option["type"] for option in options]}
        return {"anyOf": options}
    if origin in (list, tuple, Sequence) and (origin is not tuple or inner[1:] == (...,)):
        return {"type": "array", "items": type_schema(inner[0], where)}
    if origin in (dict, Mapping) and inner[0] is str:
        return {"type": "object", "additionalProperties": type_schema(inner[1], where)}
    raise UserError(
        f"{where}: JSON has no {hint}. Use str, int, float, bool, list[...], dict[str, ...], Literal[...], or None, "
        "or describe the function in --tools JSON."
    )


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the `Args:` section, and the description of each argument in it."""
    said: list[str] = []
    about: dict[str, str] = {}
    in_arguments, name = False, ""
    for line in text.splitlines():
        if ARGUMENTS.match(line):
            in_arguments = True
        elif SECTION.match(line):
            break
        elif not in_arguments:
            said.append(line)
        elif found := ARGUMENT.match(line):
            name = found[1]
            about[name] = found[2].strip()
        elif line.strip() and name:
            about[name] = f"{about[name]} {line.strip()}"
    return " ".join(" ".join(said).split()), about
