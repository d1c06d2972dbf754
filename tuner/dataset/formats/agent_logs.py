"""Logs of agents as text: ModelScope's MSAgent (ReAct steps or marked calls) and Agent-FLAN."""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from tuner.dataset.formats.fields import Row, field, function_call, objects, one_of, parsed, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import Message, RowError, shorten

SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# No pattern may look twice at the same text, or a long row of blanks would take for ever: blanks are stripped in code.
BOTH = re.DOTALL | re.MULTILINE
STEP = re.compile(r"(.*?)^Action:([^\n]+)\n+Action Input:(.*?)(?=^Observation:|\Z)", BOTH)
SEEN = re.compile(r"Observation:(.*?)(?=^(?:Thought|Action|Final Answer):|\Z)", BOTH)
LISTED = re.compile(r"^[ \t]*\d+\.[ \t]*(?:([\w.\-]+):(.*?)Parameters:(.*)|(\{.*))$", re.MULTILINE)
RAN = re.compile(r"\s*(<\|startofexec\|>)")
THINK, THOUGHT, EXECUTE, EXECUTED = "<|startofthink|>", "<|endofthink|>", "<|startofexec|>", "<|endofexec|>"
INSTRUCTIONS = "Use the following format:"  # what follows explains ReAct, whose place InternLM2's own grammar takes
API_LIST = "Specifically, you have access to the following APIs:"
OUTPUT_FORMAT = " Your output should follow this format:\nThought:\nAction\nAction Input:\n"


def msagent(row: Row) -> dict[str, Any]:
    """{"conversations": turns or their text}: MSAgent's ReAct steps (Thought, Action, Action Input) or marked calls.

    The APIs that the system turn numbers, or ToolLLaMA's list of them, become `tools`, each step a tool call, what was
    observed its result. What explains the steps' own notation is left out: calls are written in the model's grammar.
    """
    turns = _turns(row)
    messages: list[Message] = []
    tools: list[dict[str, Any]] = []
    for place, turn in enumerate(turns):
        where = f"turn {place}"
        role = one_of(field(turn, "from", str, where), SPEAKERS, f"'from' of {where}")
        value = field(turn, "value", str, where)
        waits = bool(messages) and "tool_calls" in messages[-1]
        if role == "system":
            value, found = _read_apis(value)
            tools += found
            messages += [{"role": "system", "content": value}] if value else []
        elif role == "assistant":
            messages += _read_steps(value, where)
        elif waits and (role == "tool" or value.startswith("Observation:")):
            messages.append({"role": "tool", "content": value.removeprefix("Observation:").strip()})
        else:
            messages.append({"role": role, "content": value})
    return conversation(messages, tools)


def _turns(row: Row) -> list[Row]:
    """The turns; ModelScope keeps them as the text of a Python list, which is read and never executed."""
    written = row.get("conversations")
    if not isinstance(written, str):
        return objects(row, "conversations", "turn")
    turns = _literal(written, "'conversations', being text,")
    return objects({"conversations": turns}, "conversations", "turn")


def _literal(words: str, what: str) -> Any:
    """A value that may be written as Python's repr or as JSON."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in it, which are the writer's
            return ast.literal_eval(words)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return parsed(words, what)


def _read_apis(system: str) -> tuple[str, list[dict[str, Any]]]:
    """What a system turn says beside its numbered APIs, and these as function schemas."""
    tools: list[dict[str, Any]] = []
    for name, description, parameters, plugin in LISTED.findall(system):
        if plugin:
            tools += _plugin(parsed(plugin.strip(), "an API of the system turn"))
        else:
            listed = parsed(parameters.strip(), f"the parameters of API {name!r}")
            tools.append(_schema(name, description.strip(), listed))
    if not tools:
        return _read_api_list(system)
    said = LISTED.sub("", system).partition(INSTRUCTIONS)[0]
    return said.strip(), tools


def _read_api_list(system: str) -> tuple[str, list[dict[str, Any]]]:
    """The same where the APIs are schemas in one list at the end, as ToolLLaMA's system turns have them."""
    before, found, listed = system.partition(API_LIST)
    if not found or not listed.lstrip().startswith("["):
        return system, []
    tools = _literal(listed.strip(), "the APIs of the system turn")
    require(isinstance(tools, list), "the APIs of the system turn to be a list", tools)
    return before.replace(OUTPUT_FORMAT, "").strip(), tools


def _plugin(plugin: Any) -> Iterator[dict[str, Any]]:
    """The functions of {"plugin_schema_for_model": {"paths": [...]}}, or of such a schema itself."""
    require(isinstance(plugin, dict), "an API of the system turn to be an object", plugin)
    schema = plugin.get("plugin_schema_for_model", plugin)
    for path in objects(schema, "paths", "path of an API", "an API of the system turn"):
        name = field(path, "name", str, "a path of an API")
        yield _schema(name, path.get("description", ""), path.get("parameters", []))


def _schema(name: str, description: str, parameters: Any) -> dict[str, Any]:
    require(isinstance(parameters, list), f"the parameters of API {name!r} to be a list", parameters)
    properties: dict[str, Any] = {}
    needed = []
    for parameter in parameters:
        require(isinstance(parameter, dict), f"each parameter of API {name!r} to be an object", parameter)
        label = field(parameter, "name", str, f"a parameter of API {name!r}")
        properties[label] = {key: parameter[key] for key in ("type", "description", "enum") if key in parameter}
        if str(parameter.get("required", False)).lower() == "true":
            needed.append(label)
    schema = {"type": "object", "properties": properties, "required": needed}
    return {"name": name, "description": description, "parameters": schema}


def _read_steps(text: str, where: str) -> Iterator[Message]:
    """An assistant's text as messages: calls with what was thought, the results it quotes, the answer."""
    if THINK in text:
        yield from _read_marked(text, where)
        return
    at = 0
    while step := STEP.match(text, at):
        thought, name, written = step.groups()
        yield _call(_bare(thought), name.strip(), _arguments(written, where), where)
        at = step.end()
        if seen := SEEN.match(text, at):
            yield {"role": "tool", "content": seen[1].strip()}
            at = seen.end()
    rest = text[at:].strip()
    thought, marked, answer = rest.partition("Final Answer:")
    if marked:
        rest = "\n".join(part for part in (_bare(thought), answer.strip()) if part)
    if rest or at == 0:
        yield {"role": "assistant", "content": rest}


def _bare(thought: str) -> str:
    return thought.strip().removeprefix("Thought:").strip()


def _unfenced(words: str) -> str:
    """What a block of JSON holds; words that are in no block as they are."""
    words = words.strip()
    if len(words) < 6 or not (words.startswith("```") and words.endswith("```")):
        return words
    inside = words[3:-3]
    return (inside[4:] if inside[:4].lower() == "json" else inside).strip()


def _arguments(written: str, where: str) -> Any:
    words = _unfenced(written)
    return parsed(words, f"the Action Input in {where}") if words else {}


def _call(content: str, name: str, arguments: Any, where: str) -> Message:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [function_call(name, arguments, f"the Action in {where}")],
    }


def _read_marked(text: str, where: str) -> Iterator[Message]:
    """MSAgent-Bench's first form: a JSON request between marks, what it gave between other marks, then the answer."""
    at = 0
    while (begin := text.find(THINK, at)) >= 0:
        said = text[at:begin].strip()
        written, at = _between(text, begin, THINK, THOUGHT, where)
        request = _arguments(written, where)
        require(isinstance(request, dict), f"the request in {where} to be an object", request)
        yield _call(said, field(request, "api_name", str, where), request.get("parameters"), where)
        if ran := RAN.match(text, at):
            result, at = _between(text, ran.start(1), EXECUTE, EXECUTED, where)
            yield {"role": "tool", "content": _unfenced(result)}
    if rest := text[at:].strip():
        yield {"role": "assistant", "content": rest}


def _between(text: str, begin: int, opening: str, closing: str, where: str) -> tuple[str, int]:
    """What stands between two marks, the first of which begins at `begin`, and where the second one ends."""
    start = begin + len(opening)
    end = text.find(closing, start)
    if end < 0:
        raise RowError(
            f"Expected {closing} behind each {opening} of {where}, got {shorten(text[start : start + 100])}."
        )
    return text[start:end], end + len(closing)


def agent_flan(row: Row) -> dict[str, Any]:
    """{"conversation": [{"role", "content", "loss"?}, ...]}: Agent-FLAN, whose steps are told in plain words."""
    messages = []
    for turn in objects(row, "conversation", "turn"):
        trained = turn.get("role") == "assistant"  # the file gives every turn a loss, that of a user being false
        messages.append({**turn} if trained else {key: turn[key] for key in turn if key != "loss" or turn[key]})
    return conversation(messages, row.get("tools"))


MSAGENT_EXAMPLE = {
    "conversations": [
        {
            "from": "system",
            "value": "You have access to the following APIs:\n1. find_recipe: Finds a recipe. Parameters: "
            + json.dumps([{"name": "dish", "description": "What to cook.", "required": "True"}])
            + "\n\nUse the following format:\n\nThought: what to do\nAction: the API\nAction Input: its input\n",
        },
        {"from": "user", "value": "How do I cook rice?"},
        {
            "from": "assistant",
            "value": 'Thought: I look it up.\nAction: find_recipe\nAction Input: {"dish": "rice"}\n'
            "Observation: Two parts water, twelve minutes.\n"
            "Thought: I know the answer.\nFinal Answer: In two parts of water, for twelve minutes.",
        },
    ]
}
AGENT_FLAN_EXAMPLE = {
    "conversation": [
        {"role": "user", "content": "Which tool finds a train?", "loss": False},
        {"role": "assistant", "content": "The timetable; I need the two towns.", "loss": True},
    ],
    "id": "0",
}
