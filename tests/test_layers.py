"""Imports point down only, and siblings never import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # top first; modules in one tuple are siblings
    ("cli",),
    ("conversions", "evaluations"),
    ("arguments",),
    ("launch",),
    ("evaluate",),
    ("train", "prepare", "chat", "convert", "preview", "lint", "prove", "plan"),
    ("check", "config"),
    ("configs",),
    ("engine",),
    ("method",),
    ("model", "dataset"),
    ("demo",),
    ("parallel",),
    ("new_files", "failures"),
    ("constants", "errors", "nearest", "masking"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SEES_MMENGINE = {"train", "config", "configs", "engine"}
PACKAGE = ROOT / "tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(dotted: str) -> str | None:
    """`tuner.dataset.shards` -> `dataset`; None for the package itself and for others' packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "tuner" and len(parts) > 1 else None


def imported_modules(source: str) -> list[tuple[int, str]]:
    """Line and dotted name of every import, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "tuner" else [node.module]
            found += [(node.lineno, str(name)) for name in names]
    return found


def violations(own: str, source: str) -> list[str]:
    """Imports in a module of layer `own` that point up or sideways."""
    problems = []
    for line, name in imported_modules(source):
        target = layer_of(name)
        if name.split(".")[0] == "mmengine" and own not in SEES_MMENGINE:
            problems.append(f"line {line}: {own} must not see mmengine")
        if target is None or target == own or target.startswith("__"):
            continue
        if LEVEL[target] <= LEVEL[own]:
            problems.append(f"line {line}: {own} imports {target}")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    assert own in LEVEL, f"{own} has no layer; add it to LAYERS"
    assert violations(own, path.read_text(encoding="utf-8")) == []


def test_an_upward_a_sideways_and_a_foreign_import_are_found():
    assert violations("dataset", "from tuner.engine.loop import TrainLoop") == ["line 1: dataset imports engine"]
    assert violations("dataset", "def f():\n    from tuner.model import build") == ["line 2: dataset imports model"]
    assert violations("model", "import mmengine.runner") == ["line 1: model must not see mmengine"]
    assert violations("engine", "from tuner import cli") == ["line 1: engine imports cli"]
    assert violations("engine", "from tuner.method.sft import SFT") == []


def test_there_is_no_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "helper", "apis", "tools", "common", "misc"}
    names = {path: {part.removesuffix(".py") for part in path.relative_to(ROOT).parts} for path in MODULES}
    assert [path for path, parts in names.items() if drawers & parts] == []


def test_nobody_imports_opencv():
    imports = [(path, name) for path in MODULES for _, name in imported_modules(path.read_text(encoding="utf-8"))]
    assert [path for path, name in imports if name.split(".")[0] == "cv2"] == []


def test_mmengine_brings_deepspeed_along_nowhere():
    imports = [(path.name, name) for path in MODULES for _, name in imported_modules(path.read_text(encoding="utf-8"))]
    direct = {path for path, name in imports if name in ("mmengine._strategy", "mmengine.runner")}
    assert direct == {"frame.py"}
    assert [path for path, name in imports if name.split(".")[0] == "deepspeed"] == []
