"""Tensors put together from the rows and columns of others, read only where they are asked for; none is ever whole."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tuner.convert.tensors import BLOCK_SIZE, Piece


class Source(Protocol):
    """What has rows: a stored tensor, or one of the classes below."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of at least one dimension."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(last - first, ...) of its rows."""


@dataclass(frozen=True)
class Rows:
    """Ranges of rows one after the other: (source, first row, row behind the last)."""

    ranges: tuple[tuple[Source, int, int], ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the first; all have one."""
        return self.ranges[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """All their rows, as wide as the first."""
        return sum(last - first for _, first, last in self.ranges), *self.ranges[0][0].shape[1:]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """From the ranges that have them."""
        found, place = [self.ranges[0][0].rows(0, 0)], 0
        for source, begin, end in self.ranges:
            low, high = max(first - place, 0), min(last - place, end - begin)
            if low < high:
                found.append(source.rows(begin + low, begin + high))
            place += end - begin
        return torch.cat(found)


@dataclass(frozen=True)
class Columns:
    """Matrices side by side."""

    sources: tuple[Source, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the first; all have one."""
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as each has."""
        return self.sources[0].shape[0], sum(source.shape[1] for source in self.sources)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Those of each, side by side."""
        return torch.cat([source.rows(first, last) for source in self.sources], dim=1)


@dataclass(frozen=True)
class ColumnRange:
    """Columns `first` to `last` of a matrix."""

    source: Source
    first: int
    last: int

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrix."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows, fewer columns."""
        return self.source.shape[0], self.last - self.first

    def rows(self, first: int, last: int) -> torch.Tensor:
        """A part of each row."""
        return self.source.rows(first, last)[:, self.first : self.last]


@dataclass(frozen=True)
class Shuffled:
    """Rows in another order inside each run of `len(order)` rows: row i of a run is row order[i] of the source's."""

    source: Source
    order: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Whole runs are read, so that ranges may begin anywhere."""
        run = len(self.order)
        begin, end = first // run * run, -(-last // run) * run
        whole = self.source.rows(begin, end)
        ordered = whole.unflatten(0, (-1, run))[:, list(self.order)].flatten(0, 1) if end > begin else whole
        return ordered[first - begin : last - begin]


def all_rows(sources: Sequence[Source]) -> Rows:
    """Tensors one after the other."""
    return Rows(tuple((source, 0, source.shape[0]) for source in sources))


def blocks_of(source: Source) -> Iterator[torch.Tensor]:
    """All rows, about BLOCK_SIZE values at a time."""
    step = max(1, BLOCK_SIZE // max(1, math.prod(source.shape[1:])))
    for first in range(0, source.shape[0], step):
        yield source.rows(first, min(first + step, source.shape[0]))


def piece_of(name: str, source: Source, shape: tuple[int, ...] | None = None) -> Piece:
    """What is to be written under a name; `shape` where only the order of values is the source's."""
    return Piece(name, source.dtype, source.shape if shape is None else shape, lambda: blocks_of(source))


def digest(source: Source) -> str:
    """sha256 of the tensor's bytes, row after row."""
    found = hashlib.sha256()
    for block in blocks_of(source):
        found.update(block.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass(frozen=True)
class Reshaped:
    """The values of a vector as a tensor of another shape."""

    source: Source
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the vector."""
        return self.source.dtype

    def rows(self, first: int, last: int) -> torch.Tensor:
        """A range of the vector."""
        width = math.prod(self.shape[1:])
        return self.source.rows(first * width, last * width).view(last - first, *self.shape[1:])


def leaves(source: Source) -> Iterator[Source]:
    """The tensors in files that a source is put together from."""
    if isinstance(source, Rows):
        inner: Sequence[Source] = [part for part, _, _ in source.ranges]
    elif isinstance(source, Columns):
        inner = source.sources
    elif isinstance(source, (ColumnRange, Shuffled, Reshaped)):
        inner = [source.source]
    else:
        yield source
        return
    for part in inner:
        yield from leaves(part)
