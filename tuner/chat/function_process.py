"""The process in which a user's functions run: it imports their file, says what they are, and calls them by name."""

import asyncio
import importlib.util
import inspect
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.chat.signatures import schema_of
from tuner.errors import UserError

Functions = dict[str, Callable[..., Any]]


def serve(file: str, memory: int, described: list[str] | None) -> None:
    """One line of JSON out for what the file holds, then one line in and one out for each call, until the input ends.

    `described` names the functions whose schemas are known from elsewhere; None asks for the schema of each.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the functions print is for the terminal
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    functions: Functions = {}
    try:
        functions = public_functions(Path(file))
        tools = [schema_of(function) for function in functions.values()] if described is None else []
        first: dict[str, Any] = {"names": list(functions), "tools": tools}
    except UserError as error:
        first = {"error": str(error)}
    except BaseException as error:  # the file may do whatever Python can
        first = {"error": "".join(traceback.format_exception(type(error), error, within(error, file))).rstrip()}
    say(answers, first)
    for line in sys.stdin:
        request = json.loads(line)
        say(answers, {"result": call(functions[request["name"]], request["arguments"], file)})


def say(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def public_functions(file: Path) -> Functions:
    """Functions of the file by name: those in its `__all__`, or all that are defined in it without a leading _."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file. Give one that ends in .py.")
    sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == file.stem and not name.startswith("_")
    ]
    functions = {name: getattr(module, name) for name in getattr(module, "__all__", own)}
    if not functions:
        raise UserError(f"{file} defines no function. Each function in it is a tool; those that begin with _ are not.")
    return functions


def call(function: Callable[..., Any], arguments: dict[str, Any], file: str) -> str:
    """What the model is told: text as it is, anything else as JSON; of an error, its type and message."""
    try:
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except Exception as error:
        traceback.print_exception(type(error), error, within(error, file))
        return f"error: {type(error).__name__}: {error}"


def within(error: BaseException, file: str) -> Any:
    """The part of a traceback that begins in the user's file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return trace
