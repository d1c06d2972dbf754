"""Files, functions and repetition stay within the style's budgets."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_NESTING, MAX_PARAMETERS, DUPLICATE_LINES = 400, 60, 3, 8, 8
FOLDERS = ("tuner", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
RECIPES = ROOT / "tuner" / "configs" / "recipes"  # self-contained on purpose: they may repeat each other
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest block inside a function; an `elif` is as deep as its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def num_parameters(node: ast.FunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(node: ast.FunctionDef) -> bool:
    """A click command: its parameters are the command line's."""
    return any("option" in ast.unparse(d) or "argument" in ast.unparse(d) for d in node.decorator_list)


def is_forward(node: ast.FunctionDef) -> bool:
    """A model's forward: its parameters are the framework's contract."""
    return node.name == "forward"


def over_budget(source: str) -> list[str]:
    """What in one file is over budget, as readable lines."""
    problems = []
    if (length := len(source.splitlines())) > MAX_FILE_LINES:
        problems.append(f"file of {length} lines")
    for node in functions(ast.parse(source)):
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{node.name}: {length} lines")
        if nesting(node) > MAX_NESTING:
            problems.append(f"{node.name}: nesting {nesting(node)}")
        if num_parameters(node) > MAX_PARAMETERS and not is_command(node) and not is_forward(node):
            problems.append(f"{node.name}: {num_parameters(node)} parameters")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_within_budget_and_says_what_it_is_for(path: Path):
    source = path.read_text(encoding="utf-8")
    assert over_budget(source) == []
    assert ast.get_docstring(ast.parse(source)), "a module starts with one line that says what it is for"


def code_lines(source: str) -> list[tuple[int, str]]:
    """Lines that carry code: no blanks, comments, docstrings, imports or closing brackets."""
    hidden: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            hidden |= set(range(node.lineno, node.end_lineno + 1))
    stripped = [(number, line.strip()) for number, line in enumerate(source.splitlines(), 1)]
    return [(n, line) for n, line in stripped if n not in hidden and len(line) > 3 and not line.startswith("#")]


def duplicates(files: dict[str, str]) -> list[str]:
    """Places where `DUPLICATE_LINES` code lines in a row occur twice."""
    seen: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, source in files.items():
        lines = code_lines(source)
        for start in range(len(lines) - DUPLICATE_LINES + 1):
            window = lines[start : start + DUPLICATE_LINES]
            seen[tuple(line for _, line in window)].append(f"{name}:{window[0][0]}")
    return [" = ".join(places) for places in seen.values() if len(places) > 1]


def test_no_block_is_written_twice():
    sources = [path for path in SOURCES if not path.is_relative_to(RECIPES)]
    assert duplicates({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources}) == []


def test_the_budgets_bite():
    deep = "def f(a):\n if a:\n  for b in a:\n   while b:\n    with b:\n     pass\n"
    assert over_budget(deep) == ["f: nesting 4"]
    assert over_budget("def f():\n" + " x = 1\n" * 60) == ["f: 61 lines"]
    assert over_budget("def f(a, b, c, d, e, g, h, i, j): pass") == ["f: 9 parameters"]
    assert over_budget("pass\n" * 401) == ["file of 401 lines"]
    block = "\n".join(f"value_{i} = {i}" for i in range(8))
    assert duplicates({"a": block, "b": "other = 1\n" + block}) == ["a:1 = b:2"]
