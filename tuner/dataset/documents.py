"""A chunk of rows -> documents of at most max_length tokens, with a ledger of every token: the work of one worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.chat_template import Segment
from tuner.dataset.ledger import Count, Ledger
from tuner.dataset.loss_weights import NO_SPANS, Spans, spans_of, surplus
from tuner.dataset.read import Chunk, Row
from tuner.dataset.reading.strict_json import parse_row
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.dataset.tokenize import Document
from tuner.errors import UserError

TOO_LONG = ("truncate", "split", "drop")
ON_BAD_ROW = ("raise", "skip")
UNCUT = (1 << 31) - 1  # a max_length that no row reaches


class Block(NamedTuple):
    """Documents end to end."""

    ids: NDArray[np.uint32]  # (tokens,)
    trained: NDArray[np.bool_]  # (tokens,)
    lengths: NDArray[np.int64]  # (documents,)
    num_loss_tokens: NDArray[np.int64]  # (documents,)
    lines: NDArray[np.int64]  # (documents,): where in the file each one begins
    spans: Spans = NO_SPANS  # labels that do not weigh 1


class BadRow(NamedTuple):
    """A row that gives no document, and why."""

    row: Row
    reason: str


class EncodedChunk(NamedTuple):
    """What a worker makes of a chunk; `position` is the chunk's."""

    block: Block
    ledger: Ledger
    bad_rows: list[BadRow]
    position: int


class Cuts(NamedTuple):
    """Documents to keep as intervals [start, end) of the tokens end to end; `owners` says which document each was."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]
    num_loss_tokens: NDArray[np.int64]


@dataclass(frozen=True)
class RowEncoder:
    """Turns chunks of rows into documents. The same chunk gives the same bytes in any process."""

    to_sample: Callable[[dict[str, Any]], dict[str, Any]]
    samples: SampleEncoder
    max_length: int
    too_long: str
    on_bad_row: str

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Under on_bad_row="raise" the work stops at the first bad row, which the caller must raise."""
        samples: list[list[Segment] | Document] = []
        lines: list[int] = []
        bad_rows: list[BadRow] = []
        for row in chunk.rows:
            try:
                samples.append(self._segments(row))
                lines.append(row.line)
            except UserError as error:
                bad_rows.append(BadRow(row, str(error)))
                if self.on_bad_row == "raise":
                    break
        block, ledger = self._encode(samples, np.array(lines, np.int64))
        ledger += Ledger(rows=len(samples) + len(bad_rows), skipped=len(bad_rows))
        return EncodedChunk(block, ledger.check(), bad_rows, chunk.position)

    def _segments(self, row: Row) -> list[Segment] | Document:
        if row.fault:
            raise UserError(row.fault)
        return self.samples.segments(convert(parse_row(row.content), self.to_sample))

    def _encode(self, samples: list[list[Segment] | Document], lines: NDArray[np.int64]) -> tuple[Block, Ledger]:
        documents = self.samples.encode(samples)
        ids = np.concatenate([np.empty(0, np.uint32), *(document.ids for document in documents)])
        trained = np.concatenate([np.empty(0, np.bool_), *(document.trained for document in documents)])
        lengths = np.array([len(document.ids) for document in documents], np.int64)
        weights = _weights(documents)
        borders = [document.borders for document in documents]
        cuts, ledger = fit(lengths, trained, self.max_length, self.too_long, borders)
        sizes = cuts.ends - cuts.starts
        if sizes.sum() < len(ids):
            kept = np.concatenate([np.empty(0, np.int64), *map(np.arange, cuts.starts, cuts.ends)])
            ids, trained = ids[kept], trained[kept]
            weights = None if weights is None else weights[kept]
        spans = NO_SPANS if weights is None else spans_of(weights, _labels(trained, sizes))
        ledger += Ledger(weight_surplus=float(surplus(spans).sum()))
        return Block(ids, trained, sizes, cuts.num_loss_tokens, lines[cuts.owners], spans), ledger


def convert(content: dict[str, Any], to_sample: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The sample of a row's content. Raises UserError, whatever a function of the user's own raises."""
    try:
        return to_sample(content)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the data_format function raised {type(error).__name__}: {error}") from error


def _weights(documents: Sequence[Document]) -> NDArray[np.float32] | None:
    """Weights of the documents' tokens end to end; None where all of them weigh 1."""
    if all(document.weights is None for document in documents):
        return None
    given = (np.ones(len(d.ids), np.float32) if d.weights is None else d.weights for d in documents)
    return np.concatenate(list(given))


def _labels(trained: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which trained tokens have a predecessor in their own document."""
    labels = trained.copy()
    labels[np.cumsum(lengths) - lengths] = False
    return labels


def fit(
    lengths: NDArray[np.int64],
    trained: NDArray[np.bool_],
    max_length: int,
    too_long: str,
    borders: Sequence[Sequence[int]] = (),
) -> tuple[Cuts, Ledger]:
    """Cut documents (of `lengths`, their marks end to end in `trained`) to max_length; drop what has no label.

    `borders` are places in each document, in tokens, where it is best split; none where nobody has any.
    """
    if too_long == "split" and any(borders):
        starts, ends, owners = _at_borders(lengths, max_length, borders)
    else:
        starts, ends, owners = _intervals(lengths, max_length, too_long)
    before = np.concatenate([[0], np.cumsum(trained)])  # trained tokens before each position
    num_loss_tokens = before[ends] - before[np.minimum(starts + 1, ends)]
    kept = num_loss_tokens > 0
    over = lengths > max_length
    ledger = Ledger(
        read=_count(lengths),
        dropped=_count(lengths[over]) if too_long == "drop" else Count(),
        untrained=_count((lengths[owners] if too_long == "truncate" else ends - starts)[~kept]),
        truncated=_count((lengths - max_length)[over & kept]) if too_long == "truncate" else Count(),
        split=int(over.sum()) if too_long == "split" else 0,
        pieces=int(over[owners].sum()) if too_long == "split" else 0,
        kept=_count((ends - starts)[kept]),
        masked=int((ends - starts - num_loss_tokens)[kept].sum()),
        unpredicted=int(trained[starts[kept]].sum()),
        trained=int(num_loss_tokens[kept].sum()),
    )
    return Cuts(starts[kept], ends[kept], owners[kept], num_loss_tokens[kept]), ledger


def _at_borders(
    lengths: NDArray[np.int64], max_length: int, borders: Sequence[Sequence[int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Starts, ends and owners of pieces that end at a border where one is in reach, and are full where none is."""
    starts: list[int] = []
    ends: list[int] = []
    owners: list[int] = []
    first = 0
    for owner, (length, own) in enumerate(zip(lengths.tolist(), borders)):
        start = border = 0
        for edge in (*own, length):
            if edge - start > max_length and border > start:
                starts.append(first + start)
                start = border
            while edge - start > max_length:
                starts.append(first + start)
                start += max_length
            border = edge
        starts.append(first + start)
        first += length
        ends += [*starts[len(ends) + 1 :], first]
        owners += [owner] * (len(ends) - len(owners))
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(owners, np.int64)


def _count(lengths: NDArray[np.int64]) -> Count:
    return Count(len(lengths), int(lengths.sum()))


def _intervals(
    lengths: NDArray[np.int64], max_length: int, too_long: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Starts, ends and owners of what too_long leaves of each document."""
    first = np.cumsum(lengths) - lengths
    owners = np.arange(len(lengths))
    if too_long == "truncate":
        return first, first + np.minimum(lengths, max_length), owners
    if too_long == "drop":
        owners = owners[lengths <= max_length]
        return first[owners], (first + lengths)[owners], owners
    pieces = np.maximum(1, -(-lengths // max_length))
    owners = np.repeat(owners, pieces)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = first[owners] + number * max_length
    return starts, np.minimum(starts + max_length, (first + lengths)[owners]), owners
