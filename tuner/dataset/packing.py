"""Documents to packs: a pure function of lengths, max_length and a seed; best-fit, in bulk per length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.ordering import (
    PIECE,
    IntArray,
    by_length,
    number_type,
    permutation,
    pieces,
    random_bits_of,
)
from tuner.errors import UserError

RUN = 8  # packs of like cost that follow each other
WINDOW = 1024  # packs, drawn at random, among which like is put to like
ALIKE = 1 / 20  # costs that differ by no more are in random order, so that epochs of few packs put other ones together


@dataclass(frozen=True)
class Packs:
    """Packs in the order in which they are trained; pack p is `documents[edges[p]:edges[p + 1]]`.

    Both are int32 where that suffices: sum them in int64.
    """

    documents: IntArray  # (documents,) every document number once
    edges: IntArray  # (packs + 1,)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        """The document numbers of a pack."""
        return self.documents[self.edges[pack] : self.edges[pack + 1]].astype(np.int64)

    def sizes(self, values: IntArray) -> NDArray[np.int64]:
        """(packs,) the sum over each pack's documents of `values` (documents,): lengths, or labels."""
        return _sums(self.documents, self.edges, values, power=1)

    def costs(self, lengths: IntArray) -> NDArray[np.int64]:
        """(packs,) what attention takes of each: the sum of the documents' squared `lengths` (documents,)."""
        return _sums(self.documents, self.edges, lengths, power=2)


NO_PACKS = Packs(np.empty(0, np.int32), np.zeros(1, np.int32))


def _sums(documents: IntArray, edges: IntArray, values: IntArray, *, power: int) -> NDArray[np.int64]:
    sums = np.empty(len(edges) - 1, np.int64)
    for first, end in _spans(edges):
        own = values[documents[edges[first] : edges[end]]].astype(np.int64) ** power
        sums[first:end] = np.add.reduceat(own, edges[first:end] - edges[first])
    return sums


def _spans(edges: IntArray) -> Iterator[tuple[int, int]]:
    """Packs from and to, of PIECE documents or a single pack."""
    first, last = 0, len(edges) - 1
    while first < last:
        end = int(np.searchsorted(edges, int(edges[first]) + PIECE, side="right")) - 1
        yield first, (end := max(first + 1, end))
        first = end


class _Part(NamedTuple):
    """What a kind of pack holds: `number` documents of `length`, and before them `rest`."""

    length: int
    number: int
    rest: "_Part | None"


class _Kind(NamedTuple):
    """`number` packs that hold the same lengths and have the same room left."""

    number: int
    content: _Part | None


def pack(lengths: IntArray, max_length: int, seed: Sequence[int]) -> Packs:
    """Every document in exactly one pack of at most `max_length` tokens.

    Best-fit decreasing: the longest document left goes to the fullest pack that has room. Which lengths meet in a pack
    follows from the lengths alone, so the number of packs does not depend on the seed; the seed (any integers, such as
    (seed, epoch)) says which of the documents of a length goes where, and the order of the packs (`balanced_order`);
    documents of lengths that no other has keep their company. The same on every platform and with every version of
    numpy: random numbers are splitmix64 of the seed and the document's number. Beside `lengths` it takes some 12 bytes
    a document at its peak, of which 4 and some for each pack stay.
    Raises UserError if a document is longer than `max_length`.
    """
    if not len(lengths):
        return NO_PACKS
    if lengths.max() > max_length:
        raise UserError(
            f"A document has {lengths.max()} tokens, a pack has room for {max_length}. "
            "Give packing the max_length that the shards were made with, or more."
        )
    ordered, starts = by_length(lengths, seed)
    packs = _fill(_best_fit(np.diff(starts), max_length), ordered, starts)
    del ordered
    return reorder(packs, balanced_order(packs.costs(lengths), seed))


def pack_each(lengths: IntArray, seed: Sequence[int]) -> Packs:
    """One document per pack, in the order that `pack` would give such packs."""
    costs = lengths.astype(np.int64)
    costs *= costs
    return Packs(balanced_order(costs, seed), np.arange(len(lengths) + 1, dtype=number_type(len(lengths))))


def balanced_order(costs: IntArray, seed: Sequence[int]) -> IntArray:
    """Packs in random order, but in runs of RUN whose costs are alike; `costs` (packs,): what attention takes of each.

    Ranks that take the packs of a run at the same time wait little for each other. Packs are shuffled, sorted by cost
    (raised by up to ALIKE at random) inside windows of WINDOW and cut into runs, and the runs are shuffled: no part of
    an epoch has more of the long documents than another. Costs rise in every other run and fall in those between, so
    that no rank always has the most. The packs that fill no run come last.
    """
    order = permutation(len(costs), seed)
    num_runs = len(costs) // RUN
    inside = order[: num_runs * RUN]
    for piece in pieces(len(inside)):  # which holds whole windows
        packs = inside[piece]
        raised = costs[packs] * (1 + ALIKE * 2.0**-53 * (random_bits_of(packs, [*seed, 3]) >> np.uint64(11)))
        inside[piece] = packs[np.lexsort((raised, np.arange(len(packs)) // WINDOW))]
    runs = inside.reshape(num_runs, RUN)[permutation(num_runs, [*seed, 2])]
    runs[1::2] = runs[1::2, ::-1]
    inside[:] = runs.ravel()
    return order


class _Rooms:
    """Kinds of packs by the room they have left; finds the least room that suffices in constant time.

    A set of integers as bits of words of WORD bits, and one word more for which of them are not zero.
    """

    WORD = 1024

    def __init__(self, max_length: int) -> None:
        self._kinds: dict[int, list[_Kind]] = {}
        self._words = [0] * (max_length // self.WORD + 1)
        self._filled = 0

    def put(self, room: int, kind: _Kind) -> None:
        word, bit = divmod(room, self.WORD)
        self._kinds.setdefault(room, []).append(kind)
        self._words[word] |= 1 << bit
        self._filled |= 1 << word

    def take(self, length: int) -> tuple[int, _Kind] | None:
        """A kind with the least room of at least `length`, and that room."""
        word, bit = divmod(length, self.WORD)
        bits = self._words[word] >> bit << bit
        if not bits:
            filled = self._filled >> (word + 1) << (word + 1)
            if not filled:
                return None
            word = _lowest(filled)
            bits = self._words[word]
        bit = _lowest(bits)
        room = word * self.WORD + bit
        kind = self._kinds[room].pop()
        if not self._kinds[room]:
            del self._kinds[room]
            self._words[word] ^= 1 << bit
            self._filled ^= (not self._words[word]) << word
        return room, kind

    def all(self) -> list[_Kind]:
        """Every kind, the fullest first."""
        return [kind for _, group in sorted(self._kinds.items()) for kind in group]


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _best_fit(counts: IntArray, max_length: int) -> list[_Kind]:
    """Kinds of packs for `counts[n]` documents of each length n.

    All packs of a kind are filled at once, so the work grows with the number of different lengths, not of documents.
    """
    rooms = _Rooms(max_length)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room, kind = rooms.take(length) or (max_length, _Kind(-(-left // (max_length // length)), None))
            for number, documents in _shares(kind.number, left, room // length):
                content = _Part(length, documents, kind.content) if documents else kind.content
                rooms.put(room - documents * length, _Kind(number, content))
                left -= number * documents
    return rooms.all()


def _shares(packs: int, documents: int, fit: int) -> list[tuple[int, int]]:
    """(packs, documents for each): as many as fit into one after the other; the last to get any gets what there is."""
    full = min(packs, documents // fit)
    rest = documents - full * fit if full < packs else 0
    shares = ((full, fit), (min(rest, 1), rest), (packs - full - min(rest, 1), 0))
    return [share for share in shares if share[0]]


def _fill(kinds: list[_Kind], ordered: IntArray, starts: IntArray) -> Packs:
    """Real documents for the kinds of packs, kind by kind."""
    documents = np.empty_like(ordered)
    used = starts[:-1].tolist()  # by length: the next of `ordered` to be given away
    edges = np.zeros(sum(kind.number for kind in kinds) + 1, ordered.dtype)
    first_pack = first_document = 0
    for number, content in kinds:
        parts = []
        while content is not None:
            parts.append(content)
            content = content.rest
        size = sum(part.number for part in parts)
        table = documents[first_document : first_document + number * size].reshape(number, size)
        column = 0
        for part in reversed(parts):
            taken = used[part.length] + number * part.number
            block = ordered[used[part.length] : taken].reshape(number, part.number)
            table[:, column : column + part.number] = block
            used[part.length], column = taken, column + part.number
        edges[first_pack + 1 : first_pack + number + 1] = first_document + size * np.arange(1, number + 1)
        first_pack, first_document = first_pack + number, first_document + number * size
    return Packs(documents, edges)


def reorder(packs: Packs, order: IntArray) -> Packs:
    """The packs in another order; those that `order` leaves out are left out."""
    sizes = np.diff(packs.edges)[order]
    edges = edges_of(sizes)
    documents = np.empty(edges[-1], packs.documents.dtype)
    for first, end in _spans(edges):
        shifts = packs.edges[order[first:end]] - edges[first:end]
        places = np.arange(edges[first], edges[end]) + np.repeat(shifts, sizes[first:end])
        documents[edges[first] : edges[end]] = packs.documents[places]
    return Packs(documents, edges)


def edges_of(sizes: IntArray) -> IntArray:
    """(packs + 1,) where packs of so many documents, one after the other, begin and end."""
    edges = np.zeros(len(sizes) + 1, number_type(int(sizes.sum())))
    np.cumsum(sizes, out=edges[1:])
    return edges
