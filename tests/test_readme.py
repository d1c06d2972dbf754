"""The README's tree is the map: a line per module, the same as the module's docstring."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w.]+/?) {2,}(?P<text>\S.*)$")


def documented() -> dict[str, str]:
    """Path -> line, read from the first code block that starts with `tuner/`."""
    block = re.search(r"```\n(tuner/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    found, stack = {}, []
    for line in block.splitlines():
        match = LINE.match(line)
        assert match, f"not a line of the tree: {line!r}"
        depth = len(match["indent"]) // 2
        stack = [*stack[:depth], match["name"].rstrip("/")]
        found["/".join(stack)] = match["text"]
    return found


def actual() -> dict[str, str]:
    """Path -> first line of the docstring, of every module and package of tuner."""
    found = {}
    for path in (ROOT / "tuner").rglob("*.py"):
        relative = path.relative_to(ROOT)
        name = relative.parent if path.name == "__init__.py" else relative
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[name.as_posix()] = docstring.splitlines()[0]
    return found


def test_the_tree_has_a_line_per_module_and_it_is_the_docstring():
    assert documented() == {key: text for key, text in actual().items() if "recipes/" not in key}


def test_the_two_commands_come_first():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```\w*\n(.*?)```", text, re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make demo", "make test"]


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named - targets == set()
