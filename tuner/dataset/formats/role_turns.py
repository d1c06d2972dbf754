"""InternLM's own role formats: the lab's ftdp rows, Lagent's inner steps, logs of the code interpreter."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tuner.dataset.formats.fields import Row, field, function_call, objects, one_of, parsed, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import Message, RowError, dump, function_body

# `thought` (Lagent: `language`) and `tool` are parts of an assistant's turn; the others are turns of their own.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "thought": "thought",
    "language": "thought",
    "tool": "calls",
    "environment": "result",
}
LOG_ROLES = {**ROLES, "tool": "result", "execution": "result", "execute": "result"}
ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"
ACTION = re.compile(r"<\|action_start\|><\|(plugin|interpreter)\|>(.*?)<\|action_end\|>\n?", re.DOTALL)
FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL)
LAST_FENCE = re.compile(r"(.*?)```(?:python|py)[ \t]*\n((?:(?!```).)*?)\n?```\s*", re.DOTALL)
UNTRAINED_TYPE = "prefix"  # ftdp's mark of an assistant turn that is given, not learnt


def ftdp(row: Row) -> dict[str, Any]:
    """{"messages": [{"role", "content", "name"?, "loss"?, "type"?}, ...]} or that list alone: the lab's ftdp rows.

    `system` turns named plugin or interpreter declare tools, `tool` turns call them, `environment` turns bear results.
    """
    return _dialogue(objects(row, "messages", "message"), ROLES)


def lagent(row: Row) -> dict[str, Any]:
    """{"messages"?: [...], "inner_steps": [{"role": language | tool | environment, ...}]}: what a Lagent agent did."""
    asked = objects(row, "messages", "message") if row.get("messages") is not None else []
    return _dialogue([*asked, *objects(row, "inner_steps", "step")], ROLES)


def interpreter(row: Row) -> dict[str, Any]:
    """{"messages": [...]}: logs of the code interpreter, whose results stand in environment, execution or tool turns.

    Code is what an assistant writes between InternLM2's marks, or in the last Python block before a result. The
    interpreter is declared, with InternLM2's own prompt where the log has none.
    """
    messages = objects(row, "messages", "message")
    results = [LOG_ROLES.get(str(message.get("role"))) == "result" for message in messages] + [False]
    written = [
        _with_marks(message) if results[place + 1] and message.get("role") == "assistant" else message
        for place, message in enumerate(messages)
    ]
    return _dialogue(written, LOG_ROLES, implied=[{"type": "code_interpreter"}])


def _with_marks(message: Row) -> Row:
    """The code block that a result follows, as an action; the fence is how such logs show that code was run."""
    content = message.get("content")
    found = LAST_FENCE.fullmatch(content) if isinstance(content, str) and "<|action_start|>" not in content else None
    if found is None:
        return message
    thought, code = found.groups()
    action = f"<|action_start|><|interpreter|>\n```python\n{code}\n```<|action_end|>"
    return {**message, "content": thought.removesuffix("\n") + action}


def _dialogue(given: Sequence[Row], roles: dict[str, str], implied: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    messages: list[Message] = []
    for place, turn in enumerate(given):
        where = f"message {place}"
        role = one_of(field(turn, "role", str, where), roles, f"the role of {where}")
        _add(messages, role, turn, where)
    messages, tools, names = _declarations(messages)
    if "code_interpreter" not in names:
        tools = [*implied, *tools]
    return conversation(messages, tools, declared=names)


def _add(messages: list[Message], role: str, turn: Row, where: str) -> None:
    """A turn, or a part of the assistant's turn that is being told."""
    kind = turn.get("name")
    require(isinstance(kind, str | None), f"the name of {where} to be text", kind)
    if role == "calls":
        call = _call(kind, field(turn, "content", object, where), where)
        _assistant(messages, turn, where).setdefault("tool_calls", []).append(call)
        return
    content = field(turn, "content", str, where)
    if role == "thought":
        message = _assistant(messages, turn, where)
        message["content"] += content
    elif role == "assistant":
        messages.append({"role": "assistant", "content": "", **_loss(turn), **({"name": kind} if kind else {})})
        _read_actions(messages[-1], content, where)
    elif role == "result":
        _check_kind(messages, kind, where)
        messages.append({"role": "tool", "content": content})
    else:
        messages.append({"role": role, "content": content, **({"name": kind} if kind else {})})


def _loss(turn: Row) -> Message:
    if turn.get("type") == UNTRAINED_TYPE:
        return {"loss": False}
    return {"loss": turn["loss"]} if turn.get("loss") is not None else {}


def _assistant(messages: list[Message], turn: Row, where: str) -> Message:
    """The assistant's turn that this is a part of: the last one, unless it is closed by a call or is another's."""
    closed = not messages or messages[-1]["role"] != "assistant"
    if not closed and turn["role"] != "tool" and "tool_calls" in messages[-1]:
        closed = True
    if closed:
        messages.append({"role": "assistant", "content": "", **_loss(turn)})
    elif _loss(turn) and _loss(turn)["loss"] != messages[-1].get("loss", True):
        raise RowError(f"Expected one loss in a turn of the assistant, got {turn['loss']!r} in {where}, a part of it.")
    return messages[-1]


def _call(kind: str | None, content: Any, where: str) -> dict[str, Any]:
    require(kind in ("plugin", "interpreter"), f"the name of {where}, a tool's, to be plugin or interpreter", kind)
    request = content if kind == "interpreter" else parsed(content, f"the content of {where}, a plugin's call,")
    if kind == "plugin":
        require(isinstance(request, dict), f'{where} to hold {{"name": ..., "parameters": {{...}}}}', request)
        return function_call(request.get("name"), request.get("parameters", request.get("arguments")), where)
    if isinstance(request, dict):  # as Lagent logs it
        parameters = field(request, "parameters", dict, where)
        request = field(parameters, "command", str, f"the parameters of {where}")
    require(isinstance(request, str), f"{where} to hold code", request)
    fenced = FENCED.fullmatch(request)
    code = fenced[1] if fenced else request.strip("\n")
    require(code.strip() != "", f"{where} to hold code", request)
    return {"type": "code_interpreter", "code_interpreter": {"input": code}}


def _read_actions(message: Message, content: str, where: str) -> None:
    """What an assistant wrote with InternLM2's marks, as text and calls."""
    closed = content.rfind(ACTION_START) <= content.rfind(ACTION_END)
    require(closed, f"{ACTION_END} behind each {ACTION_START} of {where}", content[-80:])
    thought, *rest = ACTION.split(content)  # kind, words and what follows them, for each action
    calls = [_call(kind, written, where) for kind, written in zip(rest[::3], rest[1::3])]
    left = "".join(rest[2::3])
    known = ACTION_START not in thought + left
    require(known, f"<|plugin|> or <|interpreter|> behind each {ACTION_START} of {where}", content[-80:])
    require(left.strip() == "", f"no text behind {ACTION_END} in {where}", left)
    message["content"] += thought
    if calls:
        message["tool_calls"] = calls


def _check_kind(messages: Sequence[Message], kind: str | None, where: str) -> None:
    """A result's name must be that of the call it answers."""
    calls: list[Any] = next((message["tool_calls"] for message in reversed(messages) if message.get("tool_calls")), [])
    called = {"interpreter" if call["type"] == "code_interpreter" else "plugin" for call in calls}
    fits = kind is None or not called or kind in called
    require(fits, f"the name of {where} to be that of the call before it, {' or '.join(sorted(called))}", kind)


def _declarations(messages: list[Message]) -> tuple[list[Message], list[Any], set[str]]:
    """Tools out of the system turns that declare them, where rendering them gives the same text; all their names."""
    first = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    heads, rest = messages[:first], messages[first:]
    plugins = [_functions(message["content"]) for message in heads if message.get("name") == "plugin"]
    names = {str(function_body(tool).get("name")) for tools in plugins for tool in tools or []}
    if any(tools is None for tools in plugins):  # told in words: every call must be believed
        names |= {call["function"]["name"] for call in _plugin_calls(rest)}
    if any(message.get("name") == "interpreter" for message in heads):
        names.add("code_interpreter")
    order = [message.get("name") for message in heads]
    expected = [name for name in (None, "interpreter", "plugin") if name in order]
    same_text = all(
        tools is not None and dump(tools) == message["content"] for tools, message in _pairs(heads, plugins)
    )
    if order != expected or not same_text:
        return messages, [], names
    code = [{"type": "code_interpreter", "description": m["content"]} for m in heads if m.get("name") == "interpreter"]
    plain = [message for message in heads if "name" not in message]
    return [*plain, *rest], [*code, *(tool for tools in plugins for tool in tools or [])], names


def _pairs(heads: Sequence[Message], plugins: Sequence[Any]) -> list[tuple[Any, Message]]:
    return list(zip(plugins, [message for message in heads if message.get("name") == "plugin"]))


def _plugin_calls(messages: Sequence[Message]) -> list[Any]:
    return [call for message in messages for call in message.get("tool_calls", []) if "function" in call]


def _functions(content: str) -> list[dict[str, Any]] | None:
    """Function schemas, or None where the text is something else."""
    try:
        tools = json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        return None
    whole = isinstance(tools, list) and bool(tools) and all(isinstance(tool, dict) for tool in tools)
    return tools if whole and all(isinstance(function_body(tool), dict) for tool in tools) else None


FTDP_EXAMPLE = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant.", "type": "meta"},
        {
            "role": "system",
            "name": "plugin",
            "content": '[{"name": "get_weather", "description": "The weather of a city.", "parameters": {}}]',
        },
        {"role": "user", "content": "Weather in Shanghai?"},
        {"role": "thought", "content": "I look it up."},
        {"role": "tool", "name": "plugin", "content": '{"name": "get_weather", "parameters": {"city": "Shanghai"}}'},
        {"role": "environment", "name": "plugin", "content": '{"temperature": 22}'},
        {"role": "assistant", "content": "It is 22 degrees.", "loss": True},
    ]
}
LAGENT_EXAMPLE = {
    "messages": [
        {"role": "system", "name": "interpreter", "content": "You can run Python."},
        {"role": "user", "content": "2 ** 10?"},
    ],
    "inner_steps": [
        {"role": "language", "content": "I compute it."},
        {
            "role": "tool",
            "name": "interpreter",
            "content": {"name": "IPythonInterpreter", "parameters": {"command": "```python\nprint(2 ** 10)\n```"}},
        },
        {"role": "environment", "name": "interpreter", "content": "1024"},
        {"role": "language", "content": "It is 1024."},
    ],
}
INTERPRETER_EXAMPLE = {
    "messages": [
        {"role": "user", "content": "The 10th prime?"},
        {"role": "assistant", "content": "I count.\n```python\nprint(29)\n```"},
        {"role": "execution", "content": "29"},
        {"role": "assistant", "content": "It is 29."},
    ]
}
