"""Which modules a shard depends on: an edit of any other tokenises nothing anew."""

import ast
from pathlib import Path

from tuner.dataset import fingerprint

ROOT = Path(fingerprint.__file__).parent
MODULES = {
    ".".join(("tuner.dataset", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")
}
READ_AND_ENCODE = ("tuner.dataset.read", "tuner.dataset.documents", "tuner.dataset.sample_encoder")
# says which files of a tree are read: the digest of the tree's content has that
IN_THE_CONTENT = "tuner.dataset.repository.listing"


def imported(path: Path) -> set[str]:
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {name for node in found for name in (node.module or "", *(f"{node.module}.{n.name}" for n in node.names))}


def test_modules_after_shards_are_modules() -> None:
    assert set(fingerprint.AFTER_SHARDS) <= {path.stem for path in MODULES.values()}
    assert len(set(fingerprint.AFTER_SHARDS)) == len(fingerprint.AFTER_SHARDS)


def test_nothing_that_reads_or_encodes_a_row_is_left_out_of_the_hash() -> None:
    reached: set[str] = set()
    waiting = list(READ_AND_ENCODE)
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in reached:
            reached.add(name)
            waiting += imported(MODULES[name])
    assert len(reached) > 20
    left_out = {name for name in reached if name.rpartition(".")[2] in fingerprint.AFTER_SHARDS}
    assert left_out == {IN_THE_CONTENT}
