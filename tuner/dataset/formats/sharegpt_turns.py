"""ShareGPT conversations: turns with `from` and `value`, tool calls and their results in turns of their own."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, function_call, objects, one_of, parsed, require, text_alone
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import Message, dump

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": "calls",
    "tool_call": "calls",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


def sharegpt(row: Row) -> dict[str, Any]:
    """{"conversations": [{"from", "value"}, ...], "tools"?, "system"?}: ShareGPT, with function_call and observation.

    A function_call is part of the gpt turn before it, if there is one; several in a row are parallel calls. `loss` or
    `weight` of a gpt turn may leave it out of the loss.
    """
    text_alone(row, "the row")
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": field(row, "system", str)})
    for place, turn in enumerate(objects(row, "conversations", "turn")):
        where = f"turn {place}"
        role = one_of(field(turn, "from", str, where), SPEAKERS, f"'from' of {where}")
        if role == "calls":
            _add_calls(messages, turn, where)
        else:
            messages.append({"role": role, "content": _said(turn, role, where), **_loss(turn)})
    return conversation(messages, row.get("tools"))


def _said(turn: Row, role: str, where: str) -> str:
    value = field(turn, "value", object, where)
    if role == "tool" and isinstance(value, dict | list):  # some writers keep results as JSON
        return dump(value)
    require(isinstance(value, str), f"'value' of {where} to be text", value)
    return value


def _loss(turn: Row) -> dict[str, Any]:
    return {key: turn[key] for key in ("loss", "weight") if turn.get(key) is not None}


def _add_calls(messages: list[Message], turn: Row, where: str) -> None:
    """Calls go to the assistant turn they follow at once, or to one of their own."""
    value = parsed(field(turn, "value", object, where), f"'value' of {where}, a function call,")
    calls = value if isinstance(value, list) else [value]
    require(bool(calls), f"{where} to call a function", value)
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": "", "tool_calls": [], **_loss(turn)})
    already = messages[-1].setdefault("tool_calls", [])
    for call in calls:
        require(isinstance(call, dict), f'{where} to hold {{"name": ..., "arguments": {{...}}}}', call)
        arguments = call.get("arguments", call.get("parameters"))
        already.append(function_call(call.get("name"), arguments, f"the call in {where}"))


SHAREGPT_EXAMPLE = {
    "conversations": [
        {"from": "human", "value": "How many stars has the Plough?"},
        {"from": "function_call", "value": '{"name": "count_stars", "arguments": {"figure": "Plough"}}'},
        {"from": "observation", "value": '{"stars": 7}'},
        {"from": "gpt", "value": "Seven."},
    ],
    "tools": '[{"name": "count_stars", "description": "Stars of a figure.", "parameters": {"type": "object"}}]',
}
