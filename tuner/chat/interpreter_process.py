"""The process that runs a model's code: a script of its own, which limits itself and then imports nothing of ours."""

import ast
import json
import linecache
import resource
import sys
import traceback

NAME = "<code>"


def run(code: str) -> int:
    """Run it as a notebook runs a cell, so that the value of a last expression is printed; the exit code."""
    linecache.cache[NAME] = len(code), None, code.splitlines(keepends=True), NAME  # tracebacks quote lines from it
    names = {"__name__": "__main__"}
    try:
        body = ast.parse(code, NAME).body
        split = len(body) - 1 if body and isinstance(body[-1], ast.Expr) else len(body)
        exec(compile(ast.Module(body[:split], type_ignores=[]), NAME, "exec"), names)
        exec(compile(ast.Interactive(body[split:]), NAME, "single"), names)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this function's own line
        traceback.print_exception(type(error), error, None if isinstance(error, SyntaxError) else trace)
        return 1
    return 0


def main() -> int:
    """Read limits from the command line and code from the input."""
    code = sys.stdin.buffer.read().decode(errors="replace")
    for name, value in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    return run(code)


if __name__ == "__main__":
    sys.exit(main())
