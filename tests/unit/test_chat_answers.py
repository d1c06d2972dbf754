"""What answers a model's calls: the user's functions and, where it is allowed, code; both within their limits."""

import json
import os
import time
from pathlib import Path

import pytest

from tuner.chat import functions, interpreter
from tuner.chat.answers import INTERPRETER, Answers, read_tools
from tuner.chat.functions import FunctionFile
from tuner.chat.interpreter import LIMITS, MAX_OUTPUT, run_code
from tuner.chat.signatures import schema_of
from tuner.errors import UserError

FUNCTIONS = '''
import os, time
from typing import Literal

kept = []

def weather(city: str, day: Literal["today", "tomorrow"] = "today", *, details: list[str] | None = None) -> dict:
    """Weather of a city.

    As a station measured it.

    Args:
        city: its name,
            in English
        day (str): which
    """
    print("not the answer")
    return {"city": city, "day": day, "度": 20}

def add(a: int, b: float) -> str:
    return str(a + b)

async def later(text: str) -> str:
    return text[::-1]

def fail() -> str:
    raise RuntimeError("no station")

def hang() -> str:
    while True:
        time.sleep(1)

def die() -> None:
    os._exit(3)

def flood(size: int) -> str:
    return "x" * size

def hoard(size: int) -> int:
    kept.append(bytearray(size))
    return len(kept)

def steer() -> str:
    return "a\\x1b[2Jb"

def _private() -> str:
    return ""
'''


def call(name, arguments):
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"type": "function", "function": {"name": name, "arguments": written}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    opened = FunctionFile(path, seconds=1.0)
    yield opened
    opened.close()


def test_functions_are_told_to_the_model_as_their_signatures_and_docstrings_say(file):
    by_name = {tool["function"]["name"]: tool["function"] for tool in file.tools}
    assert list(by_name) == ["weather", "add", "later", "fail", "hang", "die", "flood", "hoard", "steer"]
    assert by_name["weather"] == {
        "name": "weather",
        "description": "Weather of a city. As a station measured it.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name, in English"},
                "day": {"enum": ["today", "tomorrow"], "description": "which"},
                "details": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    }


def test_a_call_is_parsed_as_json_checked_and_answered(file):
    answers = Answers(file.tools, functions=file)
    assert json.loads(answers.answer(call("weather", {"city": "Oslo"}))) == {"city": "Oslo", "day": "today", "度": 20}
    assert answers.answer(call("later", {"text": "abc"})) == "cba"
    assert answers.answer(call("fail", {})) == "error: RuntimeError: no station"
    assert answers.answer(call("steer", {})) == "a\\x1b[2Jb"
    refused = {
        "'city' is required": call("weather", {}),
        "'a' must be integer": call("add", {"a": "1", "b": 2}),
        'must be one of ["today", "tomorrow"]': call("weather", {"city": "Oslo", "day": "monday"}),
        "no argument 'town'": call("weather", {"city": "Oslo", "town": 1}),
        "must be JSON": call("add", "{'a': 1, 'b': __import__('os').getpid()}"),
    }
    for problem, wrong in refused.items():
        assert answers.answer(wrong).startswith("error: ")
        assert problem in answers.answer(wrong)
    assert not answers.answers(call("_private", {}))
    assert not answers.answers({"type": "code_interpreter", "code_interpreter": {"input": "1"}})


def test_a_function_that_hangs_dies_floods_or_hoards_ends_and_the_next_call_is_answered(file):
    answers = Answers(file.tools, functions=file)
    assert answers.answer(call("hang", {})) == "error: stopped after 1 seconds"
    assert answers.answer(call("add", {"a": 1, "b": 2})) == "3"
    assert answers.answer(call("die", {})) == "error: its process ended without an answer"
    assert "cut: 20,000 characters" in answers.answer(call("flood", {"size": 20_000}))
    assert len(answers.answer(call("flood", {"size": 20_000}))) < functions.MAX_RESULT + 100
    assert answers.answer(call("flood", {"size": 3 << 20})).startswith("error: stopped, the result has over")
    assert answers.answer(call("hoard", {"size": functions.MEMORY})).startswith("error: MemoryError")
    assert answers.answer(call("add", {"a": 1, "b": 2.5})) == "3.5"


def test_a_file_without_functions_or_with_a_mistake_is_told_with_its_line(tmp_path):
    cases = {
        "x = 1\n": "defines no function",
        "x = 1\nraise OSError('gone')\n": "line 2",
        "def f(*rest): ...\n": "cannot be given by name",
        "def f(x: bytes): ...\n": "JSON has no",
        "import os\nos._exit(1)\n": "ended without an answer",
    }
    for number, (source, message) in enumerate(cases.items()):
        path = tmp_path / f"case_{number}.py"
        path.write_text(source)
        with pytest.raises(UserError, match=message):
            FunctionFile(path)
    with pytest.raises(UserError, match="There is no file"):
        FunctionFile(tmp_path / "absent.py")


def test_declared_tools_must_be_schemas(tmp_path):
    path = tmp_path / "tools.json"
    for text in ('[{"type": "function"}]', "[1]", "{}", "["):
        path.write_text(text)
        with pytest.raises(UserError, match=r"tools\.json"):
            read_tools(path)
    path.write_text('[{"name": "f"}, {"type": "code_interpreter"}]')
    assert len(read_tools(path)) == 2


def test_a_parameter_that_a_type_cannot_describe_is_named():
    def untyped(x, y: "int | str" = 3):
        """Only this."""

    schema = schema_of(untyped)["function"]
    assert schema["parameters"]["properties"] == {"x": {}, "y": {"type": ["integer", "string"]}}
    assert schema["description"] == "Only this."


def test_code_runs_as_in_a_notebook_and_only_where_it_is_allowed():
    code = {"type": "code_interpreter", "code_interpreter": {"input": "x = 6\nprint('a')\nx * 7"}}
    assert not Answers([INTERPRETER]).answers(code)
    answers = Answers([INTERPRETER], run_code=run_code)
    assert answers.answers(code)
    assert answers.answer(code) == "a\n42"
    trace = run_code("def f():\n    return 1 / 0\nf()")
    assert "return 1 / 0" in trace
    assert trace.endswith("ZeroDivisionError: division by zero")
    assert "interpreter_process" not in trace
    assert "SyntaxError" in run_code("x = = 1")


def test_code_sees_neither_the_environment_nor_the_files_of_the_user(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    seen = run_code("import os, sys\nprint(dict(os.environ), os.listdir(), os.getcwd(), sys.flags.isolated)")
    assert "hf_abc" not in seen
    assert "TOKEN" not in seen
    assert " [] /" in seen  # the directory is empty
    assert seen.endswith(" 1")  # neither the user's directory nor PYTHONPATH is searched for modules
    assert os.getcwd() not in seen
    directory = seen.split(" [] ")[1].split()[0]
    assert not Path(directory).exists()


def test_code_is_stopped_at_each_limit(tmp_path):
    started = time.monotonic()
    assert run_code("while True: pass", seconds=0.5).endswith("[stopped after 0.5 seconds]")
    assert run_code("while True: pass", limits={**LIMITS, "RLIMIT_CPU": 1}).endswith("[ended by SIGKILL]")
    flood = run_code("while True: print('x' * 1000)")
    assert flood.endswith(f"[stopped after {MAX_OUTPUT:,} bytes of output]")
    assert len(flood) < MAX_OUTPUT + 100
    assert run_code("x = bytearray(4 << 30)").endswith("MemoryError")
    assert "File too large" in run_code("open('f', 'wb').write(bytes(32 << 20))")
    assert run_code("print('\\x1b]0;title\\x07')") == "\\x1b]0;title\\x07"
    assert time.monotonic() - started < interpreter.SECONDS  # none of them ran into the longest limit


def test_what_code_has_started_ends_with_it(tmp_path):
    mark = tmp_path / "mark"
    allowed = {**LIMITS, "RLIMIT_NPROC": 4096}
    source = f"import os, time\nif not os.fork():\n    time.sleep(1)\n    open({str(mark)!r}, 'w')\nprint('done')"
    assert run_code(source, limits=allowed) == "done"
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may start processes beyond the limit")
def test_code_starts_no_process():
    assert "BlockingIOError" in run_code("import os\nos.fork()")
