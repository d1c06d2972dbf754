"""The token ledger: where every token that was read has gone, to the last one."""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple


class Count(NamedTuple):
    """Documents and the tokens in them."""

    documents: int = 0
    tokens: int = 0

    def plus(self, tokens: int) -> "Count":
        """One more document, of `tokens` tokens."""
        return Count(self.documents + 1, self.tokens + tokens)


NONE = Count()


@dataclass(frozen=True)
class Ledger:
    """What became of rows, documents and tokens. `check` holds the sums that must come out.

    A token is *trained* if some batch asks for it as a label: it is in a trained segment and has a predecessor in its
    own document. Every other token that is kept is *masked*; the first token of a document is never a label.
    """

    tree_files: int = 0  # of source trees: files that are read
    left_out: int = 0  # of source trees: files that are not, being binary, generated, of installed packages, ...
    rows: int = 0  # rows in the files
    skipped: int = 0  # bad rows, written aside
    read: Count = NONE  # documents as encoded, before any cut
    dropped: Count = NONE  # longer than max_length, under too_long="drop"
    untrained: Count = NONE  # dropped since no token (left) is trained
    truncated: Count = NONE  # documents cut short, and the tokens cut off
    split: int = 0  # documents cut into pieces
    pieces: int = 0  # and the pieces, each a document from then on
    kept: Count = NONE
    masked: int = 0
    unpredicted: int = 0  # part of masked: would be trained, but begin a document (or a piece)
    trained: int = 0
    weight_surplus: float = 0.0  # what the trained tokens weigh in the loss, less their number: 0 where each weighs 1
    drawn: Count = NONE  # by the first epoch, where sources have weights: a document comes often, once or not at all
    packs: int = 0  # of an epoch
    max_length: int = 0  # of a pack
    padding: int = 0  # tokens that an epoch's batches add

    def __add__(self, other: "Ledger") -> "Ledger":
        """The ledger of two sets of files (not yet packed) together."""
        summed: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            summed[field.name] = Count(*map(sum, zip(mine, theirs))) if isinstance(mine, Count) else mine + theirs
        return Ledger(**summed)

    def check(self) -> "Ledger":
        """Itself, if it adds up."""
        lost = self.dropped.tokens + self.untrained.tokens + self.truncated.tokens
        assert self.rows == self.skipped + self.read.documents, self
        assert self.read.tokens == lost + self.masked + self.trained, self
        assert self.kept.tokens == self.masked + self.trained, self
        gone = self.dropped.documents + self.untrained.documents
        assert self.read.documents - self.split + self.pieces == gone + self.kept.documents, self
        return self

    @property
    def efficiency(self) -> float:
        """Share of the packs' room that documents fill."""
        tokens = self.drawn.tokens or self.kept.tokens
        return tokens / (self.packs * self.max_length) if self.packs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = {field.name for field in fields(self) if isinstance(getattr(self, field.name), Count)}
        return {key: Count(*value)._asdict() if key in counts else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        """The inverse of `to_dict`."""
        fields_of_it: dict[str, Any] = {
            key: Count(**value) if isinstance(value, dict) else value for key, value in values.items()
        }
        return cls(**fields_of_it)

    def why_empty(self, loss_on: str) -> str:
        """What left no document, and what to do about each; `loss_on` is what was chosen to be trained."""
        narrow = f'loss_on = "{loss_on}" finds nothing in them' if loss_on != "assistant" else "no answer is in them"
        said = [
            (self.skipped, "rows are bad: why is in the file named above"),
            (self.dropped.documents, 'documents are too long: raise max_length, or set too_long = "split"'),
            (self.untrained.documents, f"documents have nothing to train: {narrow}, or max_length cuts it off"),
        ]
        return "; ".join(f"{number:,} {what}" for number, what in said if number)

    def table(self) -> str:
        """For a person: one line for each way a token can go."""
        lines = [
            ("read", *self.read),
            ("- dropped, too long", *self.dropped),
            ("- dropped, nothing to train", *self.untrained),
            ("- truncated", *self.truncated),
            ("- masked", None, self.masked),
            ("- trained", None, self.trained),
            ("= kept", *self.kept),
        ]
        notes = [f"rows {self.rows:,}, bad and skipped {self.skipped:,}"]
        if self.split:
            notes.append(f"{self.split:,} documents were split into {self.pieces:,} pieces")
        if self.unpredicted:
            notes.append(f"masked holds {self.unpredicted:,} first tokens, which nothing predicts")
        if self.weight_surplus:
            notes.append(f"the trained tokens weigh {self.trained + self.weight_surplus:,.1f} in the loss")
        if self.drawn.tokens:
            lines.append(("drawn, an epoch", *self.drawn))
        if self.packs:
            lines.append(("+ padding", None, self.padding))
            notes.append(f"{self.packs:,} packs of {self.max_length:,} an epoch, {self.efficiency:.2%} full")
        rows = [f"{name:<28}{'' if n is None else f'{n:,}':>12}{tokens:>16,}{self._share(tokens):>9}"
                for name, n, tokens in lines]  # fmt: skip
        return "\n".join([f"{'token ledger':<28}{'documents':>12}{'tokens':>16}{'share':>9}", *rows, *notes])

    def _share(self, tokens: int) -> str:
        return f"{tokens / self.read.tokens:.2%}" if self.read.tokens else "-"
