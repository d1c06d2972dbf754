"""Checks of tool calls and of the order of turns."""

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.dataset.json_schema import mismatches, unknown_names
from tuner.dataset.messages import (
    ROLES,
    Message,
    RowError,
    dump,
    function_body,
    is_interpreter,
    match_results,
    results_after,
)
from tuner.lint.findings import Problem, error, excerpt, note, warning
from tuner.lint.subject import Subject, arguments_of
from tuner.nearest import nearest

MANY = 3  # mismatches of one call that are shown


def tool_arguments(subject: Subject) -> Iterator[Problem]:
    """Arguments that are no JSON object, or do not fit the schema that the row declares."""
    schemas = {name_of(tool): function_body(tool).get("parameters") for tool in functions(subject.tools)}
    for position, call in calls(subject):
        name = call["function"]["name"]
        arguments = arguments_of(call)
        where = f"message {position} calls {name!r}"
        if not isinstance(arguments, dict):
            came = excerpt(arguments if isinstance(arguments, str) else dump(arguments))
            yield error(f"{where} with arguments that are no JSON object, {came}. Write an object, or drop the row.")
            continue
        wrong = list(mismatches(arguments, schemas.get(name)))
        if wrong:
            more = f" (and {len(wrong) - MANY} more)" if len(wrong) > MANY else ""
            told = f"{'; '.join(wrong[:MANY])}{more}"
            yield error(f"{where} against its declared schema: {told}. Mend the call or the schema.")
        for unknown in unknown_names(arguments, schemas.get(name)):
            yield warning(f"{where} with an argument that is not declared, {unknown} Mend the call or declare it.")


def undeclared_tool(subject: Subject) -> Iterator[Problem]:
    """Calls of functions that the row does not declare."""
    declared = [name_of(tool) for tool in functions(subject.tools)]
    for position, call in calls(subject):
        name = call["function"]["name"]
        if name not in declared:
            near = nearest(name, declared) or f" Declared: {declared or 'nothing'}."
            yield error(f"message {position} calls {name!r}, which the row's tools do not declare.{near} Declare it.")
    if not any(is_interpreter(tool) for tool in subject.tools):
        for position, message in enumerate(subject.messages):
            if any(is_interpreter(call) for call in message.get("tool_calls") or []):
                yield error(f"message {position} runs code, but the row declares no code_interpreter. Declare it.")


def result_without_call(subject: Subject) -> Iterator[Problem]:
    """Results that answer no call."""
    for position, message in enumerate(subject.messages):
        if message["role"] == "tool" and not _comes_after_calls(subject.messages, position):
            yield error(f"message {position} is a tool result, and no call comes before it. Add the call or drop both.")
        if message.get("tool_calls"):
            results = results_after(subject.messages, position)
            try:
                match_results(message["tool_calls"], results)
            except RowError as problem:
                yield error(f"after message {position}: {problem} Pair them by tool_call_id, or by order without ids.")


def call_without_result(subject: Subject) -> Iterator[Problem]:
    """Calls whose result is missing although the conversation goes on."""
    for position, message in enumerate(subject.messages):
        called = message.get("tool_calls") or []
        results = results_after(subject.messages, position)
        if not called or position + 1 + len(results) == len(subject.messages):
            continue  # calls at the very end are what the model shall learn to write
        missing = len(called) - len(results)
        if missing > 0:
            yield error(
                f"message {position} makes {len(called)} calls and {len(results)} results follow; the answer after"
                " them teaches to invent results. Add the missing ones, or drop the row."
            )


def role_order(subject: Subject) -> Iterator[Problem]:
    """Unknown roles, turns that follow their own kind, a question that nobody answers."""
    before = ""
    after_results = False  # a model may say several things in a row behind the results of its calls
    for position, message in enumerate(subject.messages):
        role = message["role"]
        after_results = role == "tool" or (role == "assistant" and after_results)
        if role not in ROLES:
            yield error(f"message {position} has the role {role!r}.{nearest(role, ROLES)} Known: {', '.join(ROLES)}.")
        elif role == "system" and before not in ("", "system"):
            yield note(f"message {position} is a system turn after {before}. Is it meant to change the rules there?")
        elif role == before and role in ("user", "assistant") and not after_results:
            yield warning(f"messages {position - 1} and {position} are both {role} turns. Join them into one.")
        elif role == "assistant" and before in ("", "system"):
            yield note(f"message {position} is an answer before any question: it is learnt as an opening. Is it meant?")
        before = role
    if before in ("user", "tool", "system"):
        yield warning(f"the conversation ends with a {before} turn, which trains nothing. Add the answer or drop it.")


def calls(subject: Subject) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Position of the message and call, of every call of a function."""
    for position, message in enumerate(subject.messages):
        yield from ((position, call) for call in message.get("tool_calls") or [] if not is_interpreter(call))


def functions(tools: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The declared functions, those that are well formed."""
    found = [tool for tool in tools if not is_interpreter(tool) and isinstance(function_body(tool), Mapping)]
    return [tool for tool in found if isinstance(function_body(tool).get("name"), str)]


def name_of(tool: Mapping[str, Any]) -> str:
    """Name of a declared function."""
    return str(function_body(tool)["name"])


def _comes_after_calls(messages: list[Message], position: int) -> bool:
    while position and messages[position - 1]["role"] == "tool":
        position -= 1
    return position > 0 and bool(messages[position - 1].get("tool_calls"))
