"""Who answers a tool call: a function of the user's file, the interpreter where that is allowed, else the user."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuner.chat.functions import FunctionFile
from tuner.dataset.json_schema import mismatches, unknown_names
from tuner.dataset.messages import RowError, call_arguments, function_body, is_interpreter
from tuner.errors import UserError

Call = dict[str, Any]
Tool = dict[str, Any]
INTERPRETER: Tool = {"type": "code_interpreter"}


class Answers:
    """The tools that a model is told of, and what answers its calls of them.

    Nothing is executed but functions of `functions` and, if it is given, `run_code` with the model's code.
    """

    def __init__(
        self,
        tools: Sequence[Tool] = (),
        *,
        functions: FunctionFile | None = None,
        run_code: Callable[[str], str] | None = None,
    ) -> None:
        self.tools, self.functions, self.run_code = list(tools), functions, run_code

    def answers(self, call: Call) -> bool:
        """Whether a call is answered here and not by the user."""
        if is_interpreter(call):
            return self.run_code is not None
        return self.functions is not None and call["function"]["name"] in self.functions.names

    def answer(self, call: Call) -> str:
        """What the model is told of a call; of one that does not fit its schema, what is wrong with it."""
        if is_interpreter(call):
            assert self.run_code is not None
            return self.run_code(call["code_interpreter"]["input"])
        assert self.functions is not None
        name = call["function"]["name"]
        try:
            arguments = call_arguments(call)
        except RowError as error:
            return f"error: {error}"
        problem = self.refusal(name, arguments)
        return f"error: {problem}" if problem else self.functions.call(name, arguments)

    def refusal(self, name: str, arguments: dict[str, Any]) -> str:
        """What keeps arguments from fitting the function's schema; empty where they fit."""
        bodies = (function_body(tool) for tool in self.tools if not is_interpreter(tool))
        body = next((body for body in bodies if body.get("name") == name), None)
        if body is None:
            return f"{name} is not one of the functions that were declared"
        schema = body.get("parameters")
        problems = [*mismatches(arguments, schema)]
        problems += [f"there is no argument {text}" for text in unknown_names(arguments, schema)]
        return "; ".join(problems)


def read_tools(path: Path) -> list[Tool]:
    """The function schemas in a JSON file."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read tools from {path}: {error}. Give a JSON list of function schemas.") from error
    if not isinstance(tools, list):
        raise UserError(f"{path} holds a {type(tools).__name__}; give a JSON list of function schemas.")
    if wrong := [tool for tool in tools if not _is_tool(tool)]:
        raise UserError(f"{path} holds {json.dumps(wrong[0])[:80]}, which is no function schema: it needs a name.")
    return tools


def _is_tool(tool: Any) -> bool:
    if not isinstance(tool, dict):
        return False
    if is_interpreter(tool):
        return True
    body = function_body(tool)
    return isinstance(body, dict) and isinstance(body.get("name"), str)
