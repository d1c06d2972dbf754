"""The ring's zig-zag: every token held once, every pair computed once, the same work for every rank."""

import random
from itertools import accumulate, pairwise

import pytest
import torch

from tuner.parallel.zigzag import blocks_of, held_by, scores_of, zigzag


def random_edges(seed: int, num_ranks: int) -> list[int]:
    generator = random.Random(seed)
    lengths = [generator.choice([0, 1, 1, 2, 3, 5, 17, 60]) for _ in range(generator.randint(1, 12))]
    return list(accumulate([*lengths, -sum(lengths) % num_ranks or num_ranks], initial=0))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(15))
def test_each_rank_holds_as_many_tokens_and_each_token_is_held_once(num_ranks, seed):
    edges = random_edges(seed, num_ranks)
    held = [held_by(zigzag(edges, num_ranks), rank) for rank in range(num_ranks)]
    assert {len(one.position) for one in held} == {edges[-1] // num_ranks}
    assert torch.equal(torch.cat([one.position for one in held]).sort().values, torch.arange(edges[-1]))
    assert all((one.position.diff() > 0).all() for one in held)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(15))
def test_blocks_compute_each_pair_of_a_causal_mask_inside_documents_once(num_ranks, seed):
    edges = random_edges(seed, num_ranks)
    held = [held_by(zigzag(edges, num_ranks), rank).position for rank in range(num_ranks)]
    computed = torch.zeros(edges[-1], edges[-1], dtype=torch.int)
    for rank in range(num_ranks):
        for step, block in enumerate(blocks_of(edges, num_ranks, rank)):
            assert torch.equal(held[rank][block.query_rows], block.query_position)
            assert torch.equal(held[(rank - step) % num_ranks][block.key_rows], block.key_position)
            for queries, keys in zip(pairwise(block.query_edges), pairwise(block.key_edges)):
                pairs = torch.ones(queries[1] - queries[0], keys[1] - keys[0], dtype=torch.int)
                rows, columns = block.query_position[slice(*queries)], block.key_position[slice(*keys)]
                computed[rows[:, None], columns[None]] += pairs.tril() if block.causal else pairs
    document = torch.arange(len(edges) - 1).repeat_interleave(torch.tensor(edges).diff())
    assert torch.equal(computed, (document[:, None] == document[None]).int().tril())


def excess(work: list[int]) -> float:
    """How much longer the slowest rank works than the mean."""
    return max(work) * len(work) / sum(work) - 1


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "lengths",
    [[32768], [1000] * 5 + [768, 15000], [20, 3000, 511, 77, 2048, 900, 1, 1, 12000, 5, 640]],
    ids=["1", "7", "11"],
)
def test_documents_are_balanced_one_by_one_where_halves_of_the_pack_are_not(num_ranks, lengths):
    edges = list(accumulate([*lengths, -sum(lengths) % (2 * num_ranks)], initial=0))
    work = [sum(map(scores_of, blocks_of(edges, num_ranks, rank))) for rank in range(num_ranks)]
    assert excess(work) < 0.002
    seen = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)]) + 1  # keys that a token sees
    in_order = seen.unflatten(0, (num_ranks, -1)).sum(1).tolist()
    assert excess(in_order) > 0.1
    if len(lengths) > 1:
        runs = seen.unflatten(0, (2 * num_ranks, -1)).sum(1)
        assert excess((runs + runs.flip(0))[:num_ranks].tolist()) > 10 * excess(work)
