"""Which source each pack of an endless run is of: any 1,000 in a row have as many of each, give or take one."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np

from tuner.dataset.ordering import IntArray

BLOCK = 1000  # packs: over so many, wherever they begin, the shares hold
BLOCKS = 512  # blocks that differ; then they come again from the last to the first, then from the first, and so on
NEAR = 0.25  # packs: a share of a block this near to a whole number of packs is that number,
ALIKE = 1 / 400  # if that changes it by no more than this part of it
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its multiples modulo 2**64 lie evenly, however many


class Places:
    """A place for each pack of a block, the same in every block but for few: a window of BLOCK packs holds each once.

    Places have two orders. In order of cost a place that costs little comes before one that costs more, whatever their
    sources. In order of time runs of `run` neighbours follow each other, so that packs trained at the same time cost
    alike, and the runs come such that every part of a block has cheap and costly ones.
    """

    def __init__(self, costs: Sequence[IntArray], shares: Sequence[float], *, run: int, seed: int) -> None:
        """`costs[s]` are those of some packs of source s, `shares[s]` its part of all packs."""
        self.average = whole_shares(shares)
        """packs of each source in a block"""
        numbers = _numbers(self.average)
        self._by_cost = _blocks(numbers, [np.sort(each) for each in costs])
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(numbers, axis=0)])
        self._ranks = _ranks(run, seed)  # (BLOCK,) in order of time, the place's number in order of cost

    def sources(self, first: int, last: int) -> tuple[IntArray, IntArray]:
        """(last - first,) the source of each of these packs, and (sources,) how many packs of each come before."""
        block, begin = divmod(first, BLOCK)
        number = np.arange(block, -(-last // BLOCK)) % (2 * BLOCKS)
        found = self._by_cost[np.minimum(number, 2 * BLOCKS - 1 - number)][:, self._ranks].ravel()
        early, wanted = np.split(found[: last - block * BLOCK], [begin])
        return wanted, self._before_block(block) + np.bincount(early, minlength=self._before.shape[1])

    def ranks(self, source: int, first: int, number: int) -> IntArray:
        """(number,) for packs of a source, from its own pack `first` on: how costly its place is in the block."""
        lap = self._ranks_of_lap[source]
        return lap[(first + np.arange(number)) % len(lap)]

    @cached_property
    def _ranks_of_lap(self) -> list[IntArray]:
        """Of each source, until the blocks come again."""
        sources, _ = self.sources(0, 2 * BLOCKS * BLOCK)
        ranks = np.tile(self._ranks, 2 * BLOCKS)
        return [ranks[sources == source] for source in range(self._before.shape[1])]

    def _before_block(self, block: int) -> IntArray:
        laps, rest = divmod(block, 2 * BLOCKS)
        whole = self._before[-1]
        here = self._before[rest] if rest <= BLOCKS else 2 * whole - self._before[2 * BLOCKS - rest]
        return 2 * laps * whole + here


def whole_shares(shares: Sequence[float]) -> list[float]:
    """Packs of each source in a block, on average; near a whole number they are that, and the others make up for it.

    Where a block has a pack more of a source than its share now and then, it is off by almost a pack if the share is
    just over a whole number. A pack is 1 / BLOCK of a block's tokens, times q where it holds q times what packs do on
    average; so a source of n + f packs in a block, 0 < f < 1, is off by max(f, 1 - f) q / BLOCK in some block, whatever
    the order, unless its share in the long run is changed, as is done here where that is a small change.
    """
    given = [BLOCK * share / sum(shares) for share in shares]
    free = list(range(len(given)))
    while near := [s for s in free if abs(given[s] - round(given[s])) < min(NEAR, ALIKE * given[s])]:
        whole = round(given[near[0]])
        over, given[near[0]] = given[near[0]] - whole, float(whole)
        free.remove(near[0])
        heirs = free or [given.index(max(given))]
        total = sum(given[s] for s in heirs)
        for heir in heirs:
            given[heir] *= 1 + over / total
    return given


def _numbers(given: Sequence[float]) -> IntArray:
    """(BLOCKS, sources) whole packs of each source: rounded down, or up where most is owed until then."""
    rates = [max(1, round(number * BLOCKS)) for number in given]
    rates[rates.index(max(rates))] += BLOCK * BLOCKS - sum(rates)
    owed = [0] * len(rates)
    rows = []
    for _ in range(BLOCKS):
        row = [rate // BLOCKS for rate in rates]
        owed = [debt + rate % BLOCKS for debt, rate in zip(owed, rates)]
        for source in sorted(range(len(rates)), key=lambda source: (-owed[source], source))[: BLOCK - sum(row)]:
            row[source] += 1
            owed[source] -= BLOCKS
        rows.append(row)
    return np.array(rows, np.int64)


def _blocks(numbers: IntArray, costs: Sequence[IntArray]) -> IntArray:
    """(BLOCKS, BLOCK) sources in order of cost.

    Two blocks in a row differ only where a source gains or loses a place, so that a window across them has as many
    of each source as the one or the other.
    """
    first = numbers[0].tolist()
    expected = [(costs[s][(2 * i + 1) * len(costs[s]) // (2 * n)], s) for s, n in enumerate(first) for i in range(n)]
    block = np.array([source for _, source in sorted(expected)], np.int64)
    blocks = [block]
    for before, after in pairwise(numbers):
        block = block.copy()
        losing, winning = np.flatnonzero(after < before).tolist(), np.flatnonzero(after > before).tolist()
        for loser, winner in zip(losing, winning):
            block[_place_to_give(block, loser, winner)] = winner
        blocks.append(block)
    return np.array(blocks)


def _place_to_give(block: IntArray, loser: int, winner: int) -> int:
    """The loser's place that costs most nearly what the winner's own do; its middle one if the winner has none."""
    mine, theirs = np.flatnonzero(block == loser), np.flatnonzero(block == winner)
    if not len(theirs):
        return int(mine[len(mine) // 2])
    return int(mine[np.abs(mine[:, None] - theirs[None, :]).min(axis=1).argmin()])


def _ranks(run: int, seed: int) -> IntArray:
    runs = np.arange(BLOCK).reshape(-1, run)[even_order(BLOCK // run, seed)]
    runs[1::2] = runs[1::2, ::-1]
    return runs.ravel()


def even_order(number: int, seed: int) -> IntArray:
    """The numbers below `number`, such that any few in a row lie evenly among all; the seed says which is first."""
    return np.argsort(np.arange(number, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(seed % (1 << 64)))
