"""Conversations with tool calls in ShareGPT form, as a row -> sample function of one's own.

The format `sharegpt` reads such rows already; this shows how little a format of one's own takes. Name it where the
function can be imported, `data_format=examples.sharegpt:to_sample`, or put it into a copied recipe:

    from examples.sharegpt import to_sample
    ...
    data_format=to_sample,
"""

import json
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def to_sample(row: dict[str, Any]) -> dict[str, Any]:
    """`{"conversations": [{"from", "value"}], "tools": json}` to messages in OpenAI's form."""
    messages = [to_message(turn["from"], turn["value"]) for turn in row["conversations"]]
    tools = json.loads(row["tools"]) if row.get("tools") else []
    return {"messages": messages, "tools": [{"type": "function", "function": tool} for tool in tools]}


def to_message(speaker: str, text: str) -> dict[str, Any]:
    """One turn; a call is JSON with name and arguments."""
    if speaker == "function_call":
        call = json.loads(text)
        function = {"name": call["name"], "arguments": call["arguments"]}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    if speaker == "observation":
        return {"role": "tool", "content": text}
    return {"role": ROLES[speaker], "content": text}
