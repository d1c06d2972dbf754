"""Losses of tokens by where they stand and by how long their document is, with errors that hold for documents."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tuner.engine.scoring import Scores


class Row(NamedTuple):
    """Of some tokens: nats, and the standard error of their mean (None for a single document)."""

    tokens: int
    documents: int
    loss: float
    standard_error: float | None
    accuracy: float  # share that are the likeliest token

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no float holds it."""
        return math.exp(self.loss) if self.loss < math.log(1e308) else math.inf


@dataclass
class Tally:
    """Sums of each document, as they come."""

    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    def add(self, scores: Scores) -> None:
        """A document's tokens, or those of a bucket; nothing where it has none there."""
        if len(scores.places):
            self.tokens.append(len(scores.places))
            self.losses.append(float(scores.losses.sum()))
            self.hits.append(int(scores.hits.sum()))

    def row(self) -> Row:
        """The mean over tokens. Tokens of a document are alike, so its error is that of a ratio over documents:

        sqrt(D / (D - 1) x sum((L_d - mean x n_d)^2)) / N, for documents d of n_d tokens whose losses sum to L_d, D
        documents and N tokens in all (Cochran, Sampling Techniques, chapter 6).
        """
        tokens, losses = np.array(self.tokens, np.float64), np.array(self.losses)
        number, total = len(tokens), float(tokens.sum())
        mean = float(losses.sum()) / total
        error = None
        if number > 1:
            error = math.sqrt(number / (number - 1) * float(((losses - mean * tokens) ** 2).sum())) / total
        return Row(int(total), number, mean, error, sum(self.hits) / total)


@dataclass
class Buckets:
    """Powers of two times `width`: positions [0, width), [width, 2 width), [2 width, 4 width) and so on.

    A position is the number of tokens before; a document belongs to the bucket of its last token.
    """

    width: int
    all: Tally = field(default_factory=Tally)
    by_length: dict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))
    by_both: dict[tuple[int, int], Tally] = field(default_factory=lambda: defaultdict(Tally))  # (length, position)
    by_position: dict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def add(self, length: int, scores: Scores) -> None:
        """A document of `length` tokens."""
        own = self.bucket(length - 1)
        self.all.add(scores)
        self.by_length[own].add(scores)
        buckets = np.frexp(scores.places // self.width)[1]  # the bits of a number, as `bucket` counts them
        for bucket in np.unique(buckets).tolist():
            part = Scores(*(values[buckets == bucket] for values in scores))
            self.by_position[bucket].add(part)
            self.by_both[own, bucket].add(part)

    def bucket(self, position: int) -> int:
        """0 for those before `width`, then one more for each doubling."""
        return (position // self.width).bit_length()

    def edges(self, bucket: int) -> tuple[int, int]:
        """Half-open, in positions."""
        return (self.width << (bucket - 1) if bucket else 0), self.width << bucket

    def positions(self) -> dict[tuple[int, int], Row]:
        """By edges of positions, half-open."""
        return self._rows(self.by_position)

    def lengths(self) -> dict[tuple[int, int], Row]:
        """By edges of lengths: above the first number, up to and with the second."""
        return self._rows(self.by_length)

    def of_length(self, edges: tuple[int, int]) -> dict[tuple[int, int], Row]:
        """Positions in the documents of such a length."""
        own = self.bucket(edges[1] - 1)
        return self._rows({place: tally for (length, place), tally in self.by_both.items() if length == own})

    def _rows(self, tallies: Mapping[int, Tally]) -> dict[tuple[int, int], Row]:
        return {self.edges(bucket): tallies[bucket].row() for bucket in sorted(tallies)}


def as_values(row: Row) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    perplexity = row.perplexity
    return {**row._asdict(), "perplexity": perplexity if math.isfinite(perplexity) else None}
