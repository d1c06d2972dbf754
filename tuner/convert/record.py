"""conversion.json: what was written from what, the sha256 of each tensor, and what was and was not checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tuner.convert.tensors import CODES, Piece

RECORD = "conversion.json"
FORMAT = 1
PACKAGES = ("tuner", "torch", "transformers", "safetensors")


@dataclass
class Checks:
    """In words: what was compared and found equal, and what was not compared, with the reason."""

    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Lines for the terminal."""
        told = [("checked", text) for text in self.checked] + [("NOT checked", text) for text in self.not_checked]
        return "\n".join(f"{word}: {text}" for word, text in told)


def write_record(
    folder: Path,
    kind: str,
    source: Mapping[str, Any],
    pieces: Sequence[Piece],
    digests: Mapping[str, str],
    checks: Checks,
) -> None:
    """Write it beside the files that it is about; the last file of a conversion.

    Args:
        folder: what was written.
        kind: of conversion: "checkpoint", "merge" and so on.
        source: facts about what was read; names, no paths of this machine.
        pieces: the tensors that were written.
        digests: sha256 of the bytes of each.
        checks: what was done about them.
    """
    tensors = {
        piece.name: {"dtype": CODES[piece.dtype], "shape": list(piece.shape), "sha256": digests[piece.name]}
        for piece in pieces
    }
    record = {
        "format": FORMAT,
        "conversion": kind,
        "versions": {name: version(name) for name in PACKAGES},
        "source": dict(source),
        "checked": checks.checked,
        "not_checked": checks.not_checked,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != RECORD},
        "tensors": tensors,
    }
    (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
