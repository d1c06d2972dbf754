"""The one internal form of a conversation: its words, its tool calls, and the mistakes a row can hold."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuner.dataset.reading.strict_json import EXPECTED, loads
from tuner.errors import UserError
from tuner.nearest import nearest

Message = dict[str, Any]
Sample = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


class RowError(UserError):
    """A row that cannot become a sample; says what is expected and what came. Who reads the file adds file and line."""


def dump(value: object) -> str:
    """JSON on one line with its Chinese readable, as InternLM2 and Qwen saw it in training."""
    return json.dumps(value, ensure_ascii=False)


def read_json(text: str) -> Any:
    """The value of JSON text inside a row: read as strictly as the row itself. RowError says what is wrong with it."""
    try:
        return loads(text)
    except UserError as error:
        raise RowError(str(error).removesuffix(f" {EXPECTED}").removeprefix("not JSON: ").rstrip(".")) from None


def shorten(value: object, width: int = 80) -> str:
    """A value as Python writes it, cut where it is long."""
    written = repr(value)
    return written[:width] + ("..." if len(written) > width else "")


def function_body(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """name, description and parameters of a tool, whether or not it stands under the key "function"."""
    return tool.get("function", tool)


def is_interpreter(tool_or_call: Mapping[str, Any]) -> bool:
    """Whether a tool, or a call, is the code interpreter rather than a function."""
    return tool_or_call.get("type") == "code_interpreter"


def call_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a function call as a dict; they may be written as a JSON string, as OpenAI does.

    Raises RowError where the string is not JSON or not an object.
    """
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments)
        except RowError as error:
            raise RowError(
                f"The arguments of the call to {function['name']!r} must be JSON, got {shorten(arguments)} ({error})."
            ) from None
    if not isinstance(arguments, dict):
        raise RowError(
            f"The arguments of the call to {function['name']!r} must be a JSON object like"
            f' {{"city": "Shanghai"}}, got {shorten(arguments)}.'
        )
    return arguments


def match_results(calls: Sequence[Mapping[str, Any]], results: Sequence[Message]) -> list[Message | None]:
    """The result of each call: by tool_call_id where the results carry one, else by order; None where it is missing.

    Raises RowError for a result that answers none of the calls, or one that was answered already.
    """
    order = {str(call["id"]): place for place, call in enumerate(calls) if call.get("id") is not None}
    matched: list[Message | None] = [None] * len(calls)
    for position, result in enumerate(results):
        label = result.get("tool_call_id")
        by_order = label is None or not order
        place = position if by_order else order.get(str(label))
        if place is None:
            raise RowError(
                f"A tool result has tool_call_id {shorten(label)}, but the calls before it are "
                f"{shorten(sorted(order), 200)}.{nearest(str(label)[:80], order)}"
            )
        if place >= len(calls) or matched[place] is not None:
            raise RowError(f"{len(results)} tool results for {len(calls)} calls: expected one result for each call.")
        matched[place] = result
    return matched


def results_after(messages: Sequence[Message], position: int) -> list[Message]:
    """The tool turns that directly follow the message at `position`."""
    end = position + 1
    while end < len(messages) and messages[end]["role"] == "tool":
        end += 1
    return list(messages[position + 1 : end])


def split_parallel_calls(messages: Sequence[Message]) -> list[Message]:
    """One action per assistant turn, each followed by its own result; turns that `arrange_calls` joined stay whole.

    The text stays with the first call. Calls at the very end may have no result yet.
    """
    split: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        if message["role"] == "tool":
            raise RowError(f"Message {position} is a tool result, but no tool call comes before it.")
        calls = message.get("tool_calls") or []
        results = results_after(messages, position) if calls else []
        position += 1 + len(results)
        if not calls or message.get("joined"):
            split += [message, *results]
            continue
        for place, (call, result) in enumerate(zip(calls, match_results(calls, results))):
            content = message.get("content") if place == 0 else ""
            split.append({**message, "content": content, "tool_calls": [call]})
            split.extend([] if result is None else [result])
    return split


def join_parallel_calls(messages: Sequence[Message]) -> list[Message]:
    """Turns with several calls marked to stay whole, their results in the order of the calls."""
    joined: list[Message] = []
    for position, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if message["role"] == "tool":
            continue
        results = results_after(messages, position) if calls else []
        several = {"joined": True} if len(calls) > 1 else {}
        if len(set(map(is_interpreter, calls))) > 1:
            raise RowError(
                f"Expected calls of one kind in message {position}, got functions and code. "
                'Set parallel_tool_calls = "split".'
            )
        joined += [{**message, **several}, *filter(None, match_results(calls, results))]
    return joined


def refuse_parallel_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages as they are. Raises RowError for a turn with several calls."""
    for position, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            raise RowError(
                f'Expected one call a turn (parallel_tool_calls = "error"), got {len(calls)} in message {position}. '
                'Set parallel_tool_calls = "split" for a turn each, or "join" for one turn.'
            )
    return list(messages)


def keep_parallel_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages as they are: the template's own grammar decides, InternLM2's splits and Qwen's joins."""
    return list(messages)


PARALLEL_TOOL_CALLS: dict[str, Callable[[Sequence[Message]], list[Message]]] = {
    "template": keep_parallel_calls,
    "split": split_parallel_calls,
    "join": join_parallel_calls,
    "error": refuse_parallel_calls,
}
