"""Which tokens of a pack each rank of a ring holds, and which of them see which: two runs of every document."""

from itertools import pairwise
from typing import NamedTuple

import torch

# Shapes: d documents, n ranks, T tokens of the pack. All on the CPU.


class Zigzag(NamedTuple):
    """Each document in 2n runs, front_0 .. front_n-1, back_n-1 .. back_0; rank r holds front_r and back_r.

    An early run sees little and a late one much, so all ranks have like work in every document. Runs of one document
    differ by at most one token, and the tokens that are left over go round over the ranks, from document to document,
    so that each rank holds exactly T/n tokens.
    """

    front: torch.Tensor  # (d, n) int64, tokens
    back: torch.Tensor  # (d, n)
    front_start: torch.Tensor  # (d, n), where the run starts in the pack
    back_start: torch.Tensor  # (d, n)


def zigzag(edges: list[int], num_ranks: int) -> Zigzag:
    """The runs of documents with these edges, [0, ..., T]; T divides by n."""
    assert edges[-1] % num_ranks == 0
    start, lengths = torch.tensor(edges[:-1])[:, None], torch.tensor(edges).diff()[:, None]
    even, rest = lengths // (2 * num_ranks), lengths % (2 * num_ranks)
    first = (rest.cumsum(0) - rest) % num_ranks  # the rank whose turn it is
    turn = (torch.arange(num_ranks) - first) % num_ranks
    extra = (rest > turn).long() + (rest > turn + num_ranks).long()
    is_odd = torch.arange(len(lengths))[:, None] % 2 == 1  # always the same run would be longer for the same ranks
    front, back = even + (extra > is_odd.logical_not()), even + (extra > is_odd)
    front_end = start + front.cumsum(1)
    back_end = front_end[:, -1:] + back.flip(1).cumsum(1).flip(1)
    return Zigzag(front, back, front_end - front, back_end - back)


class Held(NamedTuple):
    """What one rank holds, in the order it holds it: document by document, the front run and then the back run."""

    position: torch.Tensor  # (T/n,) int64, each token's place in the pack
    document: torch.Tensor  # (T/n,)
    is_back: torch.Tensor  # (T/n,) bool


def held_by(runs: Zigzag, rank: int) -> Held:
    """The tokens of a rank."""
    lengths = torch.stack([runs.front[:, rank], runs.back[:, rank]], dim=1).flatten()  # (2d,)
    starts = torch.stack([runs.front_start[:, rank], runs.back_start[:, rank]], dim=1).flatten()
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    run = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Held(starts.repeat_interleave(lengths) + within, run // 2, run % 2 == 1)


class Block(NamedTuple):
    """Some of the queries here against some of the keys of one rank; every document in it has both.

    Without a window each query sees all keys of its document, or, where `causal`, those up to its own place.
    """

    query_rows: torch.Tensor  # int64, which of the tokens here
    key_rows: torch.Tensor  # int64, which of that rank's tokens
    query_edges: list[int]  # of the documents among the query rows
    key_edges: list[int]
    query_position: torch.Tensor  # int64, in the pack
    key_position: torch.Tensor
    causal: bool  # the keys are the queries' own tokens
    edges_on_device: tuple[torch.Tensor, torch.Tensor] | None = None  # both int32, for kernels of a GPU

    def to(self, device: torch.device) -> "Block":
        """With the rows where the tensors are that they choose from."""
        if device.type == "cpu":
            return self
        queries, keys = (
            torch.tensor(edges, dtype=torch.int32, device=device) for edges in (self.query_edges, self.key_edges)
        )
        rows = self.query_rows.to(device), self.key_rows.to(device)
        return self._replace(query_rows=rows[0], key_rows=rows[1], edges_on_device=(queries, keys))


def blocks_of(edges: list[int], num_ranks: int, rank: int) -> list[Block]:
    """What rank `rank` computes, in the order keys come round: its own, the rank's before it, and so on.

    Of an earlier rank all queries see the front runs and none the back runs. Of a later rank only queries of back
    runs see anything, and they see all.
    """
    runs = zigzag(edges, num_ranks)
    here = held_by(runs, rank)
    every = torch.tensor(True)
    blocks = []
    for source in [(rank - step) % num_ranks for step in range(num_ranks)]:
        there = held_by(runs, source)
        queries = here.is_back if source > rank else every
        keys = ~there.is_back if source < rank else every
        blocks.append(_block(_chosen(here, queries, len(edges)), _chosen(there, keys, len(edges)), source == rank))
    return blocks


class _Chosen(NamedTuple):
    """Some of the tokens that a rank holds."""

    held: Held
    chosen: torch.Tensor  # (T/n,) bool
    count: torch.Tensor  # (d + 1,) int64, how many of each document


def _chosen(held: Held, chosen: torch.Tensor, num_counts: int) -> _Chosen:
    chosen = chosen.expand_as(held.is_back)
    return _Chosen(held, chosen, held.document[chosen].bincount(minlength=num_counts))


def _block(queries: _Chosen, keys: _Chosen, causal: bool) -> Block:
    """Of the documents that have both."""
    both = (queries.count > 0) & (keys.count > 0)
    query_rows, key_rows = ((side.chosen & both[side.held.document]).nonzero().flatten() for side in (queries, keys))
    query_edges, key_edges = ([0, *side.count[both].cumsum(0).tolist()] for side in (queries, keys))
    positions = queries.held.position[query_rows], keys.held.position[key_rows]
    return Block(query_rows, key_rows, query_edges, key_edges, *positions, causal)


def scores_of(block: Block) -> int:
    """Pairs of a query and a key that a block computes: what it costs."""
    lengths = zip(pairwise(block.query_edges), pairwise(block.key_edges))
    pairs = [((end - start), (key_end - key_start)) for (start, end), (key_start, key_end) in lengths]
    return sum(q * (q + 1) // 2 if block.causal else q * k for q, k in pairs)
