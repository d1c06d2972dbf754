"""Packs of several sources by weight: over any 1,000 in a row, and where packs of like cost meet in a step."""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.ordering import IntArray, number_type, random_bits
from tuner.dataset.packing import NO_PACKS, RUN, Packs, edges_of, pack, pack_each, reorder
from tuner.dataset.places import BLOCK, Places, even_order

MIN_ROUND = 64  # packs: a source that has fewer is packed several times over at once,
MOST_DOCUMENTS = 1 << 20  # but so often that it has no more documents in a round
COMPANY = 16  # full packs that share the room of one that is not
POOR = 0.98  # of others: a pack with less is not full
FEW_BLOCKS = 2  # in a round that takes fewer, packs of other sizes are spread in time and not put where costs are like
NEIGHBOURS = 4  # packs of like size that are put in a random order among themselves


class Share(NamedTuple):
    """A source as the user named it: its weight, and how many of the files are its own."""

    name: str
    weight: float
    num_files: int


class Mixture:
    """The packs of an endless training run over weighted sources; an epoch is as many as all sources fill once.

    A pack holds documents of one source. Each source is packed as a whole (a round), and anew when that is used up: a
    small source repeats within an epoch, a large one goes on in the next where it stopped. Places say which source is
    next; what a round has goes to its places by cost. All is a function of the lengths, the weights and the seed.
    """

    def __init__(
        self,
        weights: Sequence[float],
        starts: Sequence[int],
        lengths: IntArray,
        max_length: int,
        *,
        seed: int,
        pack: bool,
        num_wanted: int | None = None,
    ) -> None:
        """Documents starts[s] to starts[s + 1] (of `lengths` tokens) are of source s and weigh weights[s].

        A run that takes no more than `num_wanted` packs, fewer than a block, has the shares in those.
        """
        self._starts, self._lengths, self._max_length = list(starts), lengths, max_length
        self._seed, self._pack = seed, pack
        self._last: dict[int, tuple[int, Packs]] = {}  # the next epoch goes on in a source's last round
        tokens = [int(lengths[start:end].sum()) for start, end in pairwise(starts)]
        once = [self._packed(source, 0, repeats=1) for source in range(len(weights))]
        counts = [len(packs) for packs in once]
        self._repeats = [self._enough(source, *each) for source, each in enumerate(zip(counts, tokens))]
        rounds = [
            self._packed(source, 0, times) if times > 1 else once[source] for source, times in enumerate(self._repeats)
        ]
        self._rounds = [len(packs) for packs in rounds]
        full = [total * times / size for total, times, size in zip(tokens, self._repeats, self._rounds)]
        self.num_packs = sum(counts)
        few = self.num_packs < BLOCK // 4 or (num_wanted is not None and num_wanted < BLOCK)
        run = 1 if few else RUN  # packs in a row of like cost are often of one source
        if run > 1:
            self.num_packs = -(-self.num_packs // run) * run  # so that every epoch begins with a run
        shares = [weight / mean for weight, mean in zip(weights, full)]
        self._places = Places([packs.costs(lengths) for packs in rounds], shares, run=run, seed=seed)

    def _enough(self, source: int, count: int, tokens: int) -> int:
        """How often a source comes in a round: until it fills MIN_ROUND packs, or is MOST_DOCUMENTS."""
        if count >= MIN_ROUND:
            return 1
        most = max(1, MOST_DOCUMENTS // (self._starts[source + 1] - self._starts[source]))
        return min(most, -(-MIN_ROUND * self._max_length // tokens) if self._pack else -(-MIN_ROUND // count))

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch; always `num_packs`."""
        first = epoch * self.num_packs
        sources, before = self._places.sources(first, first + self.num_packs)
        parts = [self._next(source, int(before[source]), int(number)) for source, number in enumerate(
            np.bincount(sources, minlength=len(before)))]  # fmt: skip
        drawn = joined(parts)
        del parts
        places = np.empty_like(sources)  # of each pack of the epoch among those, which lie source by source
        places[np.argsort(sources, kind="stable")] = np.arange(len(sources))
        return reorder(drawn, places)

    def _next(self, source: int, first: int, number: int) -> Packs:
        """Packs `first` to `first + number` of a source's endless row."""
        found = [NO_PACKS]
        size, last = self._rounds[source], first + number
        while first < last:
            turn, begin = divmod(first, size)
            packs = self._round(source, turn)
            end = min(size, begin + last - first)
            edges = packs.edges[begin : end + 1]
            found.append(Packs(packs.documents[edges[0] : edges[-1]], edges - edges[0]))
            first += end - begin
        return joined(found)

    def _round(self, source: int, turn: int) -> Packs:
        """Round `turn` of a source, in the order in which its packs are trained: costly ones at costly places."""
        if self._last.get(source, (-1,))[0] != turn:
            packs = self._packed(source, turn, self._repeats[source])
            bits = random_bits(len(packs), [self._seed, source, turn, 4])
            sizes = packs.sizes(self._lengths)
            if len(packs) < FEW_BLOCKS * self._places.average[source] and are_uneven(sizes):
                order = spread(sizes, bits, self._seed)
            else:
                places = self._places.ranks(source, turn * len(packs), len(packs))
                order = np.empty(len(packs), np.int64)
                order[np.lexsort((bits, places))] = np.argsort(packs.costs(self._lengths), kind="stable")
            self._last[source] = (turn, reorder(packs, order))
        return self._last[source][1]

    def _packed(self, source: int, turn: int, repeats: int) -> Packs:
        """The packs of a round of a source, in which each of its documents comes `repeats` times."""
        start, end = self._starts[source : source + 2]
        seed = (self._seed, source, turn)
        lengths = self._lengths[start:end]
        lengths = np.tile(lengths, repeats) if repeats > 1 else lengths
        packs = levelled(pack(lengths, self._max_length, seed), lengths) if self._pack else pack_each(lengths, seed)
        documents: IntArray = packs.documents.astype(number_type(end), copy=False)
        np.remainder(documents, end - start, out=documents)
        np.add(documents, start, out=documents)
        return Packs(documents, packs.edges)


def joined(parts: Sequence[Packs]) -> Packs:
    """The packs of one after those of the other."""
    sizes = [np.diff(part.edges) for part in parts]
    return Packs(np.concatenate([part.documents for part in parts]), edges_of(np.concatenate(sizes)))


def are_uneven(sizes: IntArray) -> bool:
    """Whether packs differ by more than 1 - POOR of their mean on average; in whole numbers, the same everywhere."""
    total, number = int(sizes.sum()), len(sizes)
    return int(np.abs(sizes * number - total).sum()) > (1 - POOR) * total * number


def spread(sizes: IntArray, bits: NDArray[np.uint64], seed: int) -> IntArray:
    """Packs in an order in which any few in a row have large and small ones alike; `bits` (packs,) are random."""
    by_size = np.lexsort((bits, sizes))
    mixed = by_size[np.lexsort((bits[by_size], np.arange(len(sizes)) // NEIGHBOURS))]
    return mixed[even_order(len(sizes), seed)]


def levelled(packs: Packs, lengths: IntArray) -> Packs:
    """The same documents in as many packs, but what few packs lack is shared by many: COMPANY others for each.

    Those with most documents share, for theirs are short; where they cannot, or most packs lack something, nothing
    changes.
    """
    sizes = packs.sizes(lengths)
    poor = np.flatnonzero(sizes < POOR * sizes.mean())
    company = min(COMPANY, len(packs) // max(1, len(poor)) - 1)
    if not len(poor) or company < 1:
        return packs
    numbers = np.diff(packs.edges)
    numbers[poor] = 0
    pool = np.concatenate([poor, np.argsort(-numbers, kind="stable")[: company * len(poor)]])
    documents = np.concatenate([packs[place] for place in pool.tolist()])
    heap = [(0, place) for place in range(len(pool))]
    shared: list[list[int]] = [[] for _ in pool]
    for document in documents[np.argsort(-lengths[documents], kind="stable")].tolist():
        tokens, place = heap[0]
        shared[place].append(document)
        heapq.heapreplace(heap, (tokens + int(lengths[document]), place))
    if max(heap)[0] > sizes.max():
        return packs
    kept = np.setdiff1d(np.arange(len(packs)), pool)
    together = Packs(np.concatenate(shared).astype(packs.documents.dtype), edges_of(np.array(list(map(len, shared)))))
    return joined([reorder(packs, kept), together])
