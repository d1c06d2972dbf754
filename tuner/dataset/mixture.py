"""Packs of several sources by weight: any 1,000 in a row hold each source's share to within one pack."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.packing import IntArray, Packs, pack, pack_each, reorder

BLOCK = 1000  # packs: over so many, wherever they begin, each source has its share to within one pack
SCALE = 1 << 40  # rates are integers of this sum, so that no rounding differs between machines
MIN_ROUND = 64  # packs: a source that has fewer is packed several times over at once


class Share(NamedTuple):
    """A source as the user named it: its weight, and how many of the files are its own."""

    name: str
    weight: float
    num_files: int


class Mixture:
    """The packs of an endless training run over weighted sources; an epoch is as many as all sources fill once.

    A pack holds documents of one source. Each source is packed as a whole (a round), and anew when that is used up: a
    small source repeats within an epoch, a large one goes on in the next where it stopped. All is a function of the
    lengths, the weights and the seed.
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
    ) -> None:
        """Documents starts[s] to starts[s + 1] (of `lengths` tokens) are of source s and weigh weights[s]."""
        self._starts, self._lengths, self._max_length = list(starts), lengths, max_length
        self._seed, self._pack = seed, pack
        self._last: dict[int, tuple[tuple[int, int], Packs]] = {}  # the next epoch goes on in a source's last round
        counts = [len(self._packed(source, 0, repeats=1)) for source in range(len(weights))]
        self._repeats = [-(-MIN_ROUND // count) for count in counts]
        self._rounds = [len(self._packed(source, 0, times)) for source, times in enumerate(self._repeats)]
        self.num_packs = sum(counts)
        tokens = [int(lengths[start:end].sum()) for start, end in pairwise(starts)]
        full = [total * times / size for total, times, size in zip(tokens, self._repeats, self._rounds)]
        self.rates = integer_rates([weight / mean for weight, mean in zip(weights, full)])
        """of SCALE: packs of each source, such that the tokens have the weights as shares"""

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch; always `num_packs`."""
        first = epoch * self.num_packs
        sources, before = sources_of_packs(self.rates, first, first + self.num_packs)
        parts = [self._next(source, int(before[source]), int(number)) for source, number in enumerate(
            np.bincount(sources, minlength=len(self.rates)))]  # fmt: skip
        documents = np.concatenate([part for part, _ in parts])
        sizes = np.concatenate([part for _, part in parts])
        places = np.empty_like(sources)  # of each pack of the epoch among those, which lie source by source
        places[np.argsort(sources, kind="stable")] = np.arange(len(sources))
        return reorder(documents, sizes, places)

    def _next(self, source: int, first: int, number: int) -> tuple[IntArray, IntArray]:
        """Packs `first` to `first + number` of a source's endless row: their documents, and how many each has."""
        documents, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        size, last = self._rounds[source], first + number
        while first < last:
            turn, begin = divmod(first, size)
            packs = self._packed(source, turn, self._repeats[source])
            end = min(size, begin + last - first)
            edges = packs.edges[begin : end + 1]
            documents.append(packs.documents[edges[0] : edges[-1]])
            sizes.append(np.diff(edges))
            first += end - begin
        return np.concatenate(documents), np.concatenate(sizes)

    def _packed(self, source: int, turn: int, repeats: int) -> Packs:
        """Round `turn` of a source, in which each of its documents comes `repeats` times."""
        if self._last.get(source, (None,))[0] == (turn, repeats):
            return self._last[source][1]
        start, end = self._starts[source : source + 2]
        seed = (self._seed, source, turn)
        lengths = np.tile(self._lengths[start:end], repeats)
        packs = pack(lengths, self._max_length, seed) if self._pack else pack_each(lengths, seed)
        packs = Packs(start + packs.documents % (end - start), packs.edges)
        self._last[source] = ((turn, repeats), packs)
        return packs


def integer_rates(rates: Sequence[float]) -> list[int]:
    """Rates as integers that add up to SCALE; the largest takes what rounding leaves."""
    total = sum(rates)
    scaled = [round(rate / total * SCALE) for rate in rates]
    scaled[scaled.index(max(scaled))] += SCALE - sum(scaled)
    return scaled


def sources_of_packs(rates: Sequence[int], first: int, last: int) -> tuple[IntArray, IntArray]:
    """(last - first,) the source of each of these packs, and (sources,) how many packs of each come before `first`."""
    before = np.zeros(len(rates), np.int64)
    found = []
    for number, block in enumerate(_blocks(rates)):
        start = number * BLOCK
        if start >= last:
            break
        before += np.bincount(block[: max(0, first - start)], minlength=len(rates))
        found.append(block[max(0, first - start) : last - start])
    return np.concatenate([np.empty(0, np.int64), *found]), before


def _blocks(rates: Sequence[int]) -> Iterator[IntArray]:
    """(BLOCK,) sources, block after block, without end.

    Two blocks in a row differ only where a source gains or loses one place, so that a window across them has as many
    of each source as the one or the other.
    """
    owed = [0] * len(rates)
    counts = _block_counts(rates, owed)
    block = _spread(counts)
    while True:
        yield block
        after = _block_counts(rates, owed)
        losing = [source for source, number in enumerate(after) if number < counts[source]]
        gaining = [source for source, number in enumerate(after) if number > counts[source]]
        block = block.copy()
        for loser, winner in zip(losing, gaining):
            block[_place_to_give(block, loser, winner)] = winner
        counts = after


def _block_counts(rates: Sequence[int], owed: list[int]) -> list[int]:
    """Places of each source in the next block: its share rounded down, or up where most is `owed` (which is kept)."""
    counts = [BLOCK * rate // SCALE for rate in rates]
    for source, rate in enumerate(rates):
        owed[source] += BLOCK * rate - counts[source] * SCALE
    left = BLOCK - sum(counts)
    for source in sorted(range(len(rates)), key=lambda source: (-owed[source], source))[:left]:
        counts[source] += 1
        owed[source] -= SCALE
    return counts


def _spread(counts: Sequence[int]) -> IntArray:
    """A block in which each source's places are as even as can be."""
    keys = [((2 * turn + 1) / number, source) for source, number in enumerate(counts) for turn in range(number)]
    return np.array([source for _, source in sorted(keys)], np.int64)


def _place_to_give(block: IntArray, loser: int, winner: int) -> int:
    """The place of the loser that is farthest from the winner's own; blocks are taken as a ring."""
    mine, theirs = np.flatnonzero(block == loser), np.flatnonzero(block == winner)
    if not len(theirs):
        return int(mine[len(mine) // 2])
    apart: NDArray[np.int64] = np.abs(mine[:, None] - theirs[None, :])
    return int(mine[np.minimum(apart, BLOCK - apart).min(axis=1).argmax()])
