"""Packing: every document once, none cut, as full as best-fit gets, and a function of its arguments alone."""

import time
import tracemalloc

import numpy as np
import pytest

from tuner.dataset import ordering
from tuner.dataset.ordering import _mix, permutation, random_bits
from tuner.dataset.packing import RUN, balanced_order, pack, pack_each, reorder
from tuner.errors import UserError


def lognormal_lengths(number: int, max_length: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(6, 1, number), 1, max_length).astype(np.int64)


def best_fit_one_by_one(lengths: list[int], max_length: int) -> list[int]:
    """Rooms left by best-fit decreasing as the textbook has it, one document after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=max_length)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_bulk_packing_fills_packs_exactly_as_one_by_one_best_fit(seed):
    rng = np.random.default_rng(seed)
    max_length = int(rng.integers(1, 60))
    lengths = rng.integers(1, max_length + 1, rng.integers(1, 200))
    rooms = max_length - pack(lengths, max_length, (seed,)).sizes(lengths)
    assert sorted(rooms.tolist()) == best_fit_one_by_one(lengths.tolist(), max_length)


@pytest.mark.parametrize("lengths", [[], [1], [7], [7, 7, 7], [1] * 100, [4, 3, 4, 3, 7, 1], [3, 3, 3, 3, 3]], ids=str)
def test_every_document_is_in_exactly_one_pack_and_no_pack_is_too_long(lengths):
    lengths = np.array(lengths, np.int64)
    packs = pack(lengths, 7, (1, 2))
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    assert (packs.sizes(lengths) <= 7).all()
    assert sum(len(packs[p]) for p in range(len(packs))) == len(lengths)


def long_conversations(number: int, max_length: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(7, 1.2, number).clip(2, max_length).astype(np.int64)


def chats_papers_and_books(number: int, max_length: int) -> np.ndarray:
    """Four fifths of short chats, a few papers, and books that are cut to max_length."""
    rng = np.random.default_rng(0)
    kinds = [(6, 0.8, number * 80 // 100), (8.3, 0.7, number * 18 // 100), (10.5, 0.8, number * 2 // 100)]
    lengths = np.concatenate([rng.lognormal(mean, spread, size) for mean, spread, size in kinds])
    return rng.permutation(lengths).clip(2, max_length).astype(np.int64)


@pytest.mark.parametrize("draw", [long_conversations, chats_papers_and_books])
@pytest.mark.parametrize(("max_length", "least"), [(4096, 0.999), (32768, 0.999), (200_000, 0.998)])
def test_packs_are_full_at_every_context_length(draw, max_length, least):
    lengths = draw(60_000, max_length)
    assert pack(lengths, max_length, (0,)).sizes(lengths).mean() / max_length >= least


def waiting(packs, lengths: np.ndarray, num_ranks: int) -> float:
    """What the slowest of the ranks takes over what they take on average, in attention, step after step."""
    costs = packs.costs(lengths)
    steps = costs[: len(costs) // num_ranks * num_ranks].reshape(-1, num_ranks)
    return float(steps.max(1).sum() / steps.mean(1).sum())


@pytest.mark.parametrize(("max_length", "most"), [(4096, 1.06), (32768, 1.06), (200_000, 1.1)])
def test_ranks_that_meet_in_a_step_have_packs_of_like_cost(max_length, most):
    lengths = chats_papers_and_books(60_000, max_length)
    packs = pack(lengths, max_length, (0, 0))
    at_random = reorder(packs, permutation(len(packs), (9,)))
    assert waiting(at_random, lengths, 8) > 1.4
    for num_ranks in (2, 4, 8):
        assert waiting(packs, lengths, num_ranks) < most
    alone = pack_each(lengths, (0, 0))
    alone_at_random = reorder(alone, permutation(len(lengths), (9,)))
    assert waiting(alone, lengths, 8) < 0.4 * waiting(alone_at_random, lengths, 8)


def test_eight_ranks_at_128k_wait_a_hundredth_of_a_step():
    """FLOPs of a 7B's step: 6 for each of 7.7e9 weights and token, 6 x 32 layers x 4096 for a pair of tokens."""
    lengths = chats_papers_and_books(120_000, 131_072)
    packs = pack(lengths, 131_072, (0, 0))
    costs = 6 * 7.7e9 * packs.sizes(lengths) + 6 * 32 * 4096 * packs.costs(lengths)

    def waiting_of(costs: np.ndarray) -> float:
        steps = costs[: len(costs) // 8 * 8].reshape(-1, 8)
        return float(steps.max(1).sum() / steps.mean(1).sum())

    assert waiting_of(costs) < 1.01
    assert waiting_of(costs[permutation(len(packs), (9,))]) > 1.5


def test_balance_leaves_no_trend_of_cost_in_an_epoch():
    costs = np.random.default_rng(1).lognormal(7, 1.5, 20_005).astype(np.int64)
    order = balanced_order(costs, (4, 0))
    assert sorted(order.tolist()) == list(range(len(costs)))
    parts = [part.mean() / costs.mean() for part in np.array_split(costs[order], 5)]
    assert max(parts) < 1.25
    assert min(parts) > 0.8
    runs = costs[order[: len(order) // RUN * RUN]].reshape(-1, RUN)
    following = np.corrcoef(runs[:-1].mean(1), runs[1:].mean(1))[0, 1]
    assert abs(following) < 0.05, "a run says nothing of the next"
    first_to_last = [
        costs[balanced_order(costs, (seed,))][:20_000].reshape(-1, RUN)[:, [0, -1]].sum(0) for seed in range(8)
    ]
    assert 0.8 < np.mean([first / last for first, last in first_to_last]) < 1.25, "no rank always has the cheapest"


def test_the_company_of_a_pack_changes_with_the_epoch():
    costs = np.random.default_rng(1).integers(1, 10**9, 256)
    one, other = (balanced_order(costs, (4, epoch)).reshape(-1, RUN) for epoch in (0, 1))
    pairs = [
        {tuple(sorted((a, b))) for run in order.tolist() for a in run for b in run if a != b} for order in (one, other)
    ]
    assert len(pairs[0] & pairs[1]) < 0.6 * len(pairs[0])  # of few packs, the less they wait the less it changes


def test_seeds_give_other_packs_of_the_same_sizes():
    lengths = lognormal_lengths(30_000, 1024)
    one, again, other = (pack(lengths, 1024, (0, epoch)) for epoch in (0, 0, 1))
    assert np.array_equal(one.documents, again.documents)
    assert np.array_equal(one.edges, again.edges)
    assert not np.array_equal(one.documents, other.documents)
    assert sorted(one.sizes(lengths)) == sorted(other.sizes(lengths))
    groups = [{frozenset(packs[p].tolist()) for p in range(len(packs)) if len(packs[p]) > 3} for packs in (one, other)]
    assert len(groups[0] & groups[1]) < 0.05 * len(groups[0]), "another epoch must mix other documents"


@pytest.mark.parametrize("spread", [1, 2, 500])
def test_pieces_put_numbers_in_the_order_that_one_sort_of_all_does(monkeypatch, spread):
    lengths = np.random.default_rng(spread).integers(1, 1 + spread, 5000).astype(np.int32)
    bits = random_bits(len(lengths), [3, 1, 0])
    whole = np.lexsort((bits >> np.uint64(40), lengths)), np.argsort(random_bits(len(lengths), [3, 1]), kind="stable")
    packs = pack(lengths, 600, (3, 1))
    monkeypatch.setattr(ordering, "PIECE", 1024)
    order, starts = ordering.by_length(lengths, (3, 1))
    assert np.array_equal(order, whole[0])
    assert np.array_equal(np.diff(starts), np.bincount(lengths))
    assert np.array_equal(permutation(len(lengths), (3,)), whole[1])
    monkeypatch.setattr("tuner.dataset.packing.PIECE", 1024)
    assert all(map(np.array_equal, vars(pack(lengths, 600, (3, 1))).values(), vars(packs).values()))


def test_packing_takes_no_more_than_a_few_bytes_a_document(monkeypatch):
    """What 100 million rows of 1 KB, or 100 GB, need on a machine of 4 GB: 12 bytes beside the 4 of the length."""
    lengths = lognormal_lengths(1_000_000, 1024).astype(np.int32)
    monkeypatch.setattr(ordering, "PIECE", 1 << 15)  # so that a piece is small beside the whole, as there
    monkeypatch.setattr("tuner.dataset.packing.PIECE", 1 << 15)
    tracemalloc.start()
    packs = pack(lengths, 4096, (0, 0))
    kept, peak = (size / len(lengths) for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert packs.documents.dtype == packs.edges.dtype == np.int32
    assert kept < 5
    assert peak < 16


def test_packs_of_like_lengths_are_spread_over_the_epoch():
    lengths = np.array([10] * 400 + [5] * 800)
    packs = pack(lengths, 10, (3,))
    early = sum(lengths[packs[p][0]] == 10 for p in range(len(packs) // 2))
    assert 160 < early < 240, "about half of the 400 packs that one document fills come in the first half"


def test_the_random_order_is_the_same_on_every_machine_and_version():
    assert random_bits(3, [0]).tolist() == [12035550249420947055, 12935080325729570654, 7141179953334974231]
    assert permutation(10, [5, 2]).tolist() == [8, 3, 4, 2, 7, 6, 9, 1, 5, 0]
    assert pack(np.array([3, 3, 2, 2, 1, 1, 6]), 6, (1, 0)).documents.tolist() == [3, 2, 4, 5, 1, 0, 6]


def test_the_mixing_function_is_splitmix64():
    """The first outputs of splitmix64 seeded with 1234567, as published with Vigna's reference implementation."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * gamma) % 2**64 for step in range(3)], np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_permutation_has_no_bias_of_place():
    places = np.mean([permutation(20, [seed]) for seed in range(2000)], axis=0)
    assert np.abs(places - 9.5).max() < 0.6


def test_without_packing_each_document_is_a_pack_of_its_own():
    lengths = lognormal_lengths(50, 1000)
    packs = pack_each(lengths, (0, 1))
    assert [len(packs[p]) for p in range(len(packs))] == [1] * 50
    assert sorted(packs.documents.tolist()) == list(range(50))
    assert packs.documents.tolist() != pack_each(lengths, (0, 2)).documents.tolist()


def test_a_document_over_max_length_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"9 tokens.* 8"):
        pack(np.array([9, 1]), 8, (0,))


def test_a_million_lengths_take_less_than_two_seconds():
    lengths = lognormal_lengths(1_000_000, 32768)
    started = time.process_time()
    pack(lengths, 32768, (0, 0))
    assert time.process_time() - started < 2


def test_the_work_does_not_explode_when_all_lengths_differ():
    lengths = np.random.default_rng(0).permutation(50_000) + 1
    started = time.process_time()
    assert pack(lengths, 100_000, (0,)).sizes(lengths).mean() / 100_000 > 0.998
    assert time.process_time() - started < 10
