"""The Berkeley function-calling leaderboard: questions with schemas, and the calls that answer them."""

from collections.abc import Mapping
from typing import Any

from tuner.dataset.formats.fields import Row, field, function_call, objects, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import RowError

# BFCL names types as Python does; JSON Schema has other words. A value of any type has no `type`.
JSON_TYPES = {"dict": "object", "float": "number", "double": "number", "tuple": "array", "list": "array", "any": None}
LEFT_OUT = object()


def bfcl(row: Row) -> dict[str, Any]:
    """{"question": [[messages]], "function", "ground_truth": [{name: {parameter: [allowed values]}}]}: BFCL.

    The leaderboard keeps `ground_truth` in possible_answer/, under the same id; `tuner join-files` puts it beside the
    question. Of the allowed values the first is taken, and an optional parameter that may be left out is.
    """
    if "ground_truth" not in row:
        raise RowError(
            "Expected 'ground_truth' in the row. BFCL keeps it in possible_answer/ under the same id, and has none "
            "where no call is right. Put the two together: tuner join-files QUESTIONS ANSWERS OUT."
        )
    question = field(row, "question", list)
    single = len(question) == 1 and isinstance(question[0], list)
    require(single, "'question' to hold one list of messages (rows of several turns lack the results)", question)
    tools = [_tool(tool, f"tool {place}") for place, tool in enumerate(objects(row, "function", "tool"))]
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    calls = [_call(call, schemas, f"call {place}") for place, call in enumerate(objects(row, "ground_truth", "call"))]
    return conversation([*question[0], {"role": "assistant", "content": "", "tool_calls": calls}], tools)


def _tool(tool: Row, where: str) -> dict[str, Any]:
    name = field(tool, "name", str, where)
    schema = field(tool, "parameters", dict, where)
    properties, needed = schema.get("properties", {}), schema.get("required", [])
    require(isinstance(properties, dict), f"the properties of {where} to be an object", properties)
    whole = all(isinstance(value, dict) for value in properties.values())
    require(whole, f"each property of {where} to be an object", properties)
    require(isinstance(needed, list), f"the required parameters of {where} to be a list", needed)
    return {**tool, "name": name, "parameters": _json_schema(schema)}


def _json_schema(schema: Any) -> Any:
    """The same schema with JSON Schema's names of types."""
    if isinstance(schema, list):
        return [_json_schema(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    kind = schema.get("type")
    renamed = JSON_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    named = {key: renamed if key == "type" and isinstance(kind, str) else _json_schema(schema[key]) for key in schema}
    return {key: value for key, value in named.items() if key != "type" or value is not None}


def _call(call: Row, schemas: Mapping[Any, Any], where: str) -> dict[str, Any]:
    require(len(call) == 1, f"{where} of 'ground_truth' to name one function", call)
    [(name, allowed)] = call.items()
    require(isinstance(allowed, dict), f"the parameters of {where} to be an object", allowed)
    return function_call(name, _chosen(allowed, schemas.get(name) or {}, where), where)


def _chosen(allowed: Row, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One value for each parameter that a call needs."""
    properties, needed = schema.get("properties") or {}, schema.get("required") or []
    values = {
        key: _value(allowed[key], properties.get(key) or {}, key in needed, f"{key!r} of {where}") for key in allowed
    }
    return {key: value for key, value in values.items() if value is not LEFT_OUT}


def _value(options: Any, schema: Mapping[str, Any], needed: bool, where: str) -> Any:
    require(isinstance(options, list), f"{where} to be a list of allowed values", options)
    if not options:
        require(schema.get("type") == "array", f"{where} to allow a value", options)
        return []
    if "" in options and not needed:
        return LEFT_OUT
    option = next((option for option in options if option != ""), "")
    if isinstance(option, dict):
        return _chosen({key: _listed(option[key]) for key in option}, schema, where)
    if isinstance(option, list):
        inner = schema.get("items") or {}
        return [
            _chosen({key: _listed(part[key]) for key in part}, inner, where) if isinstance(part, dict) else part
            for part in option
        ]
    return option


def _listed(options: Any) -> list[Any]:
    return options if isinstance(options, list) else [options]


BFCL_EXAMPLE = {
    "id": "simple_0",
    "question": [[{"role": "user", "content": "The area of a triangle of base 10 and height 5?"}]],
    "function": [
        {
            "name": "triangle_area",
            "description": "The area of a triangle.",
            "parameters": {
                "type": "dict",
                "properties": {"base": {"type": "float"}, "height": {"type": "float"}, "unit": {"type": "string"}},
                "required": ["base", "height"],
            },
        }
    ],
    "ground_truth": [{"triangle_area": {"base": [10], "height": [5], "unit": ["units", ""]}}],
}
