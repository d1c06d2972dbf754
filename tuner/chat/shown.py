"""What a model, a tool or a program wrote, as lines that cannot steer the terminal."""

from typing import Any

NOT_EXECUTED = ", not executed"


def printable(text: str) -> str:
    """Control characters made visible, so that a reply cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def describe_call(call: dict[str, Any], *, is_answered: bool = False) -> str:
    """One line (or a block of code) that shows a tool call; `is_answered` if something here will execute it."""
    doubt = "" if is_answered else NOT_EXECUTED
    if call["type"] == "code_interpreter":
        return printable(f"[interpreter call{doubt}]\n" + call["code_interpreter"]["input"])
    function = call["function"]
    return printable(f"[tool call{doubt}] {function['name']}({function['arguments']})")


def name_of(call: dict[str, Any]) -> str:
    """The function that a call names, or the interpreter."""
    return call["function"]["name"] if call["type"] == "function" else "interpreter"


def describe_history(messages: list[dict[str, Any]]) -> str:
    """The conversation, a paragraph for each turn."""
    parts = []
    for message in messages:
        calls = [describe_call(call, is_answered=True) for call in message.get("tool_calls") or []]
        name = f" ({printable(message['name'])})" if "name" in message else ""
        said = printable(message["content"])
        parts.append("\n".join([f"{message['role']}{name}: {said}", *calls]))
    return "\n".join(parts) or "Nothing has been said yet."
