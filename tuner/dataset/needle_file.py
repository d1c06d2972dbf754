"""A user's own needles: facts in a file with the question about each and its answer, hidden as ours are."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tuner.dataset.needle_grid import NeedleGrid
from tuner.dataset.needles import Cell, Document, Haystack
from tuner.errors import UserError


class Needle(NamedTuple):
    """Text to hide, what is asked at the end of the document, and what shall follow."""

    needle: str
    question: str
    answer: str


@dataclass(frozen=True)
class NeedleFile:
    """A `needle_grid.Needles`: those of a file, drawn by the grid's seed, at the grid's lengths and depths.

    Args:
        path: JSON lines, {"needle": ..., "question": ..., "answer": ...}.
        grid: whose haystacks and made sentences are taken; languages name the sentences, so one map is for each.
    """

    path: Path
    grid: NeedleGrid

    def cells(self) -> list[Cell]:
        """The grid's."""
        return self.grid.cells()

    def maker(self, tokenizer: Any) -> Callable[[Cell], Document]:
        """Hides `num_needles` different ones in each document.

        Raises:
            UserError: a file that holds no such rows, or too few; needles longer than the haystack.
        """
        known, number, seed = read_needles(self.path), self.grid.num_needles, self.grid.seed
        if not 1 <= number <= len(known):
            raise UserError(f"{self.path} holds {len(known)} needles; {number} in a document were asked for.")
        prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        texts = self.grid.texts()

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            if tokenizer.unk_token_id in ids:
                raise UserError(f"The tokenizer has no tokens for parts of {text!r}. Does it belong to the model?")
            return ids

        stacks = {
            name: Haystack(name, encode, seed=seed, files=texts, prefix=prefix)
            for name in dict.fromkeys(cell.language for cell in self.cells())
        }

        def make(cell: Cell) -> Document:
            drawn = random.Random(f"{seed} {cell} {number}").sample(known, number)
            needles, questions, answers = ([encode(row[field]) for row in drawn] for field in range(3))
            return stacks[cell.language].hidden(cell, needles, questions, answers)

        for name in stacks:
            make(next(cell for cell in self.cells() if cell.language == name))
        return make


def read_needles(path: Path) -> list[Needle]:
    """The rows of a file. Raises UserError that names the first line which is none."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    found = [_needle(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{path} holds no needle. Expected: lines of JSON with {', '.join(Needle._fields)}.")
    return found


def _needle(line: str, place: str) -> Needle:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    texts = [row.get(name) for name in Needle._fields] if isinstance(row, dict) else []
    given = [text for text in texts if isinstance(text, str) and text]
    if len(given) < len(Needle._fields):
        raise UserError(f"{place}: expected a JSON object with texts under {', '.join(Needle._fields)}, got {line:.80}")
    return Needle(*given)
