"""ToolBench: the search trees that its answers are kept as."""

from collections.abc import Sequence
from typing import Any

from tuner.dataset.formats.fields import Row, field, function_call, objects, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import Message, RowError, shorten


def toolbench(row: Row) -> dict[str, Any]:
    """{"answer_generation": {"function", "train_messages", "finish_type"}, ...}: the path to ToolBench's answer.

    The last of `train_messages` is the path that was searched last. A search that gave up is refused.
    """
    answer = field(row, "answer_generation", dict)
    finish = field(answer, "finish_type", str, "'answer_generation'")
    valid = field(answer, "valid_data", bool, "'answer_generation'")
    if finish != "give_answer" or not valid:
        raise RowError(
            "Expected a search that found an answer (finish_type 'give_answer', valid_data true), got "
            f"{shorten(finish)}, {str(valid).lower()}."
        )
    paths = field(answer, "train_messages", list, "'answer_generation'")
    require(bool(paths) and isinstance(paths[-1], list), "'train_messages' to hold lists of messages", paths)
    functions = field(answer, "function", list, "'answer_generation'")
    return conversation(_messages(paths[-1]), functions)


def _messages(path: Sequence[Any]) -> list[Message]:
    messages = []
    for place, message in enumerate(objects({"path": path}, "path", "message")):
        role = field(message, "role", str, f"message {place}")
        told: Message = {"role": "tool" if role == "function" else role, "content": message.get("content") or ""}
        if message.get("function_call"):
            call = field(message, "function_call", dict, f"message {place}")
            told["tool_calls"] = [
                function_call(call.get("name"), call.get("arguments"), f"the call of message {place}")
            ]
        messages.append(told)
    return messages


TOOLBENCH_EXAMPLE = {
    "win": True,
    "answer_generation": {
        "valid_data": True,
        "finish_type": "give_answer",
        "function": [{"name": "offices", "parameters": {"type": "object"}}, {"name": "Finish"}],
        "train_messages": [
            [
                {"role": "system", "content": "Use the functions, then Finish."},
                {"role": "user", "content": "Which offices are open?"},
                {"role": "assistant", "content": None, "function_call": {"name": "offices", "arguments": "{}"}},
                {"role": "function", "name": "offices", "content": '["Port"]'},
                {
                    "role": "assistant",
                    "content": "Only one is.",
                    "function_call": {"name": "Finish", "arguments": '{"final_answer": "The port office."}'},
                },
            ]
        ],
    },
}
