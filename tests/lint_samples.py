"""Small conversations for the tests of lint."""

import json

PROSE = "The river rises in the hills of the north and reaches the sea after a journey of many days"


def talk(*turns: str | dict, tools: list | None = None) -> dict:
    """User and assistant in turn; a dict is a message as it is."""
    messages = []
    for turn in turns:
        role = "assistant" if messages and messages[-1]["role"] in ("user", "tool") else "user"
        messages.append(turn if isinstance(turn, dict) else {"role": role, "content": turn})
    return {"messages": messages, "tools": tools or []}


def answer(text: str) -> dict:
    return talk("What can you tell me?", text)


def function(name: str = "get_weather", **parameters: object) -> dict:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "day": {"enum": ["today", "tomorrow"]}}}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {**schema, "required": ["city"], **parameters}},
    }


def call(arguments: object, name: str = "get_weather", label: str | None = None) -> dict:
    made = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [made | ({"id": label} if label else {})]}


def result(text: str = "fair", label: str | None = None) -> dict:
    return {"role": "tool", "content": text} | ({"tool_call_id": label} if label else {})
