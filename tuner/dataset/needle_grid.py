"""Which needles are asked for: lengths, depths and languages, as the command and a run's settings say them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tuner.dataset.needles import NUM_KEYS, WORDINGS, Cell, Document, Haystack
from tuner.errors import UserError

MOST_CELLS = 100_000
MOST_TOKENS = 2**26  # of a document


class Needles(Protocol):
    """What may stand in the place of `NeedleGrid`: documents of another kind, made by someone else."""

    def cells(self) -> list[Cell]:
        """The places of the map, each as often as it is tried."""

    def maker(self, tokenizer: Any) -> Callable[[Cell], Document]:
        """What makes the document of a cell, the same one whenever it is asked; raises UserError where it cannot."""


class Names(NamedTuple):
    """How an error calls what was given."""

    lengths: str
    depths: str
    languages: str
    num_needles: str
    haystack: str


IN_CONFIG = Names("needle_lengths", "needle_depths", "needle_languages", "num_needles", "needle_haystack")
ON_COMMAND_LINE = Names("--lengths", "--depths", "--languages", "--needles", "--haystack")


@dataclass(frozen=True)
class NeedleGrid:
    """Documents of our wordings (`needles.WORDINGS`) at each length and depth, in each language.

    Args:
        lengths: "1k,4k,200k", tokens of whole documents; k is 1,024.
        depths: "FIRST:LAST:STEP" or a list "0,50,100", percent of the haystack before the first needle.
        languages: "en,zh".
        num_needles: in a document, from the depth on evenly to the end; all are asked for.
        num_trials: of each cell, with other needles.
        haystack: text files in the place of made sentences; of both languages alike.
        seed: of needles and sentences.
        names: in errors.
    """

    lengths: str = "1k,4k"
    depths: str = "0:100:10"
    languages: str = "en,zh"
    num_needles: int = 1
    num_trials: int = 1
    haystack: Sequence[str | Path] = ()
    seed: int = 0
    names: Names = IN_CONFIG

    def cells(self) -> list[Cell]:
        """Lengths ascend, so that what is cheap is known first.

        Raises:
            UserError: lengths, depths or languages that are none, or too many of them.
        """
        asked = parse_lengths(self.lengths, self.names.lengths)
        places = parse_depths(self.depths, self.names.depths)
        spoken = parse_languages(self.languages, self.names.languages)
        number = len(asked) * len(places) * len(spoken) * self.num_trials
        if number > MOST_CELLS:
            raise UserError(
                f"{self.names.lengths} {self.lengths} and {self.names.depths} {self.depths} are {number:,} documents "
                f"to score; at most {MOST_CELLS:,} are allowed. Ask for fewer."
            )
        tries = range(self.num_trials)
        return [Cell(name, length, at, t) for length in asked for name in spoken for at in places for t in tries]

    def maker(self, tokenizer: Any) -> Callable[[Cell], Document]:
        """Makes one of the shortest documents of each language at once, so that what cannot be made is known early.

        Raises:
            UserError: the same, files that cannot be read, needles longer than a haystack, or a tokenizer that cannot
                write them.
        """
        cells = self.cells()
        if not 1 <= self.num_needles <= NUM_KEYS:
            raise UserError(f"{self.names.num_needles} = {self.num_needles}: allowed is 1 to {NUM_KEYS} in a document.")
        texts = self.texts()
        prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        stacks = {
            name: Haystack(name, encoder(tokenizer, name), seed=self.seed, files=texts, prefix=prefix)
            for name in dict.fromkeys(cell.language for cell in cells)
        }

        def make(cell: Cell) -> Document:
            return stacks[cell.language].document(cell, self.num_needles)

        for name in stacks:
            make(next(cell for cell in cells if cell.language == name))
        return make

    def texts(self) -> list[str]:
        """Of the user's files. Raises UserError for one that cannot be read, or holds no text."""
        files = [self.haystack] if isinstance(self.haystack, str) else self.haystack
        return [read_haystack(Path(path), self.names.haystack) for path in files]


def encoder(tokenizer: Any, language: str) -> Callable[[str], list[int]]:
    """Text to ids, without special tokens. Raises UserError where the tokenizer cannot tell two needles apart."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    wording = WORDINGS[language]
    ids = encode(wording.statement.format(key=wording.keys) + " 0123456789")
    if not encode("5") or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        others = [name for name in WORDINGS if name != language]
        raise UserError(
            f"The tokenizer has no tokens for parts of the needles in {language!r}: they become "
            f"{tokenizer.unk_token!r}, and one needle is like another. Leave {language!r} out of the languages "
            f"({', '.join(others)}), or take the tokenizer that belongs to the model."
        )
    return encode


def parse_lengths(text: str, name: str = ON_COMMAND_LINE.lengths) -> list[int]:
    """`"1k,4k,512"` -> [512, 1024, 4096]; k is 1,024."""
    try:
        found = {int(float(part[:-1]) * 1024) if part[-1] in "kK" else int(part) for part in text.split(",")}
    except (AttributeError, ValueError, IndexError, OverflowError):
        found = set()
    if not found or min(found) < 1:
        raise UserError(f"{name} {text}: expected token counts such as 1k,4k,200k, where k is 1,024.")
    if max(found) > MOST_TOKENS:
        raise UserError(f"{name} {text}: {max(found):,} tokens are beyond the {MOST_TOKENS:,} that are allowed.")
    return sorted(found)


def parse_depths(text: str, name: str = ON_COMMAND_LINE.depths) -> list[float]:
    """`"0:100:10"` -> 0, 10, ... 100; `"0,50,100"` as it stands; percent of the haystack."""
    try:
        if ":" in text:
            begin, end, step = (float(part) for part in text.split(":"))
            number = int((end - begin) / step + 1e-9) + 1
            found = [begin + i * step for i in range(min(number, MOST_CELLS + 1))]
        else:
            found = sorted({float(part) for part in text.split(",")})
    except (TypeError, AttributeError, ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found or not all(0 <= depth <= 100 for depth in found):
        raise UserError(f"{name} {text}: expected FIRST:LAST:STEP or a list, in percent from 0 to 100.")
    return found


def parse_languages(text: str, name: str = ON_COMMAND_LINE.languages) -> list[str]:
    """`"en,zh"` -> ["en", "zh"]."""
    found = list(dict.fromkeys(part.strip() for part in text.split(","))) if isinstance(text, str) else [str(text)]
    if unknown := [language for language in found if language not in WORDINGS]:
        raise UserError(f"{name} {text}: {unknown[0]!r} is not known. Known: {', '.join(WORDINGS)}.")
    return found


def read_haystack(path: Path, name: str) -> str:
    """The text of a user's file. Raises UserError where there is none."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} {path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{name} {path} holds no text. Name a file with at least one line, or none for made sentences.")
    return text


def cell_means(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, dict[tuple[int, float], float]]:
    """By language: the mean of a column over the trials of each (length, depth)."""
    kept: dict[str, dict[tuple[int, float], list[float]]] = {}
    for row in rows:
        cells = kept.setdefault(row["language"], {})
        cells.setdefault((row["length"], row["depth"]), []).append(row[column])
    return {name: {key: sum(found) / len(found) for key, found in cells.items()} for name, cells in kept.items()}
