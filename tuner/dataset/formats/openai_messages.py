"""OpenAI messages: the form that all other conversations are brought to and checked in."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tuner.dataset.formats.fields import Row, field, require, text_alone
from tuner.dataset.messages import (
    ROLES,
    Message,
    RowError,
    call_arguments,
    function_body,
    is_interpreter,
    match_results,
    read_json,
    results_after,
    shorten,
)
from tuner.dataset.rendering import LOSS_WORDS, is_loss
from tuner.nearest import nearest

MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "loss", "weight")
# What others keep beside the content: words, and what is no text. Left unread, the model would learn to do without.
WORDS_ELSEWHERE = ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "text", "value")
# Which role may follow which; "calls" is an assistant turn that calls tools, "nothing" the beginning.
NEXT_ROLES = {
    "nothing": ("system", "user"),
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user", "system"),
    "calls": ("tool",),
    "tool": ("tool", "assistant", "user"),
    "assistant after tool": ("user", "assistant", "system"),
}


def openai(row: Row) -> dict[str, Any]:
    """{"messages": [...], "tools"?: [...]} as in OpenAI's fine-tuning files, with `loss` or `weight` per message.

    `weight: 0` and `loss: false` leave an assistant turn out of the loss, `loss: 0.5` halves its share of it.
    Arguments may be a JSON string or an object.
    """
    messages = field(row, "messages", list)
    text_alone(row, "the row")
    require(not row.get("functions"), "tools under 'tools', for 'functions' is their older form", row.get("functions"))
    system = row.get("system")
    read = not system or any(isinstance(turn, dict) and turn.get("content") == system for turn in messages)
    require(read, "the system text as the first message, not beside the messages", system)
    return conversation(messages, row.get("tools"))


def conversation(given: Sequence[Any], tools: Any, *, declared: Collection[str] = ()) -> dict[str, Any]:
    """Messages and tools, checked, as a sample; tools in `declared` are known from the text of the conversation.

    Raises RowError for a message, a tool, an order or a call that is not as it should be, and where nothing is trained.
    """
    schemas = _tools(tools)
    messages = [_message(message, f"message {place}") for place, message in enumerate(given)]
    _check_order(messages)
    _check_calls(messages, {*declared, *map(_tool_name, schemas)})
    trained = any(message["role"] == "assistant" and message.get("loss", True) for message in messages)
    roles = [message["role"] for message in messages]
    require(trained, "an assistant turn to train on (one whose loss is not false)", roles)
    return {"messages": messages, "tools": schemas} if schemas else {"messages": messages}


def _tool_name(tool: Mapping[str, Any]) -> str:
    return "code_interpreter" if is_interpreter(tool) else function_body(tool)["name"]


def _tools(tools: Any) -> list[Mapping[str, Any]]:
    if isinstance(tools, str) and not tools.strip():
        return []
    if isinstance(tools, str):  # tables need one type per column, so tools are often kept as JSON text
        try:
            tools = read_json(tools)
        except RowError as error:
            raise RowError(f"Expected 'tools' to be a list or its JSON, got text that is not JSON ({error}).") from None
    require(isinstance(tools, list | None), "'tools' to be a list", tools)
    for place, tool in enumerate(tools or []):
        where = f"tool {place}"
        require(isinstance(tool, dict), f"{where} to be an object", tool)
        if not is_interpreter(tool):
            body = function_body(tool)
            require(isinstance(body, dict), f"the function of {where} to be an object", body)
            field(body, "name", str, where)
    return tools or []


def _message(message: Any, where: str) -> Message:
    """One message with text for content, arguments as dicts, and the keys that the internal form knows."""
    require(isinstance(message, dict), f"{where} to be an object", message)
    role = field(message, "role", str, where)
    if role not in ROLES:
        raise RowError(
            f"Expected the role of {where} to be one of {ROLES}, got {shorten(role)}.{nearest(role[:80], ROLES)}"
        )
    for key in message:  # a misspelt key would lose what it holds without a word
        _check_words(message, key, where)
        if message[key] is not None and _misspelt(key):
            raise RowError(f"Expected the keys of {where} to be among {MESSAGE_KEYS}, got {key!r}.{_misspelt(key)}")
    text_alone(message, where)
    clean: Message = {"role": role, "content": _content(message, where)}
    if message.get("tool_calls"):
        clean["tool_calls"] = _calls(message, where)
    loss = message.get("loss", message.get("weight"))
    if loss is not None:
        require(is_loss(loss), f"the loss of {where} to be {LOSS_WORDS}", loss)
        require(role == "assistant" or not loss, f"a loss in assistant turns only, {where} to have none", role)
        clean["loss"] = bool(loss) if loss in (0, 1) else loss
    return clean | _labels(message, where)


def _check_words(message: Message, key: str, where: str) -> None:
    if key in WORDS_ELSEWHERE and message[key] and message[key] != message.get("content"):
        raise RowError(
            f"Expected the words of {where} in 'content' alone, got {key!r}: {shorten(message[key])}. Write them into "
            "the content as the model shall say them, such as <think>...</think> before the answer, or leave them out."
        )


def _labels(message: Message, where: str) -> Message:
    labels: Message = {}
    if message.get("name") is not None:
        name = field(message, "name", str, where)
        require(name.isprintable() and name != "", f"the name of {where} to be one line", name)
        labels["name"] = name
    if message.get("tool_call_id") is not None:
        require(message["role"] == "tool", f"a tool_call_id in tool turns only, {where} to have none", message["role"])
        labels["tool_call_id"] = str(message["tool_call_id"])
    return labels


@lru_cache(maxsize=256)
def _misspelt(key: str) -> str:
    """What a key was probably meant to be, '' for ours and for those that are like none of ours: notes of others."""
    if key in MESSAGE_KEYS:
        return ""
    if key == "function_call":
        return " It is the older form of 'tool_calls'."
    return nearest(key, MESSAGE_KEYS, cutoff=0.85)


def _content(message: Message, where: str) -> str:
    """The text of a message; a list of text parts is joined, an image refused."""
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and calls:
        return ""
    if "content" not in message:
        raise RowError(f"Expected 'content' in {where}, which has {sorted(message)}.{nearest('content', message)}")
    if isinstance(content, list):
        whole = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
        require(whole, f"the parts of {where} to be of type text", content)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"Expected the content of {where} to be text, got {type(content).__name__}.")
    said = content != "" or message["role"] != "assistant" or bool(calls)
    require(said, f"content or tool_calls in {where}, an assistant turn", content)
    return content


def _calls(message: Message, where: str) -> list[Mapping[str, Any]]:
    calls = field(message, "tool_calls", list, where)
    role = message["role"]
    require(role == "assistant", f"tool_calls in assistant turns only, {where} to have none", role)
    clean = []
    for place, call in enumerate(calls):
        what = f"call {place} of {where}"
        require(isinstance(call, dict), f"{what} to be an object", call)
        if is_interpreter(call):
            field(field(call, "code_interpreter", dict, what), "input", str, what)
            clean.append(call)
            continue
        function = field(call, "function", dict, what)
        field(function, "name", str, what)
        field(function, "arguments", object, what)
        clean.append({**call, "function": {**function, "arguments": call_arguments(call)}})
    labels = [str(call["id"]) for call in clean if call.get("id") is not None]
    require(len(set(labels)) == len(labels), f"the calls of {where} to differ in id", labels)
    return clean


def _check_order(messages: list[Message]) -> None:
    state = "nothing"
    for place, message in enumerate(messages):
        role = message["role"]
        allowed = NEXT_ROLES[state]
        if role not in allowed:
            why = "a tool result needs a tool call before it" if role == "tool" else f"it follows {state}"
            raise RowError(f"Expected message {place} to be {' or '.join(allowed)}, got {role!r} ({why}).")
        if role != "assistant":
            state = role
        elif message.get("tool_calls"):
            state = "calls"
        else:
            state = "assistant after tool" if state in ("tool", "assistant after tool") else "assistant"


def _check_calls(messages: list[Message], declared: set[str]) -> None:
    """Every call names a declared tool, and every call but the conversation's last ones has one result."""
    for place, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        for call in calls:
            name = "code_interpreter" if is_interpreter(call) else call["function"]["name"]
            if name not in declared:
                raise RowError(
                    f"Message {place} calls {shorten(name)}, but 'tools' declares {shorten(sorted(declared), 200)}."
                    + nearest(name[:80], declared)
                )
        results = results_after(messages, place) if calls else []
        unanswered = match_results(calls, results).count(None)
        if unanswered and place + 1 + len(results) < len(messages):
            raise RowError(
                f"Expected a result for each call of message {place}, {unanswered} of {len(calls)} have none."
            )


OPENAI_EXAMPLE = {
    "messages": [
        {"role": "user", "content": "Is it raining in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'},
        {"role": "assistant", "content": "No, it is dry."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                },
            },
        }
    ],
}
