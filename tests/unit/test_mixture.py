"""Weighted sources: each has its share of the tokens of any 1,000 packs, as a function of the seed alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.dataset.mixture import COMPANY, Mixture, levelled
from tuner.dataset.packing import RUN, Packs, pack
from tuner.dataset.places import ALIKE, BLOCK, BLOCKS, NEAR, Places, even_order, whole_shares

SHARES = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=12)
WEIGHTS = st.lists(st.sampled_from([0.01, 0.1, 0.3, 0.5, 1, 1.1, 2, 3.7, 10]), min_size=2, max_size=10)
KINDS = {  # lengths of documents, of packs of 512
    "long": lambda rng, number: rng.integers(500, 513, number),
    "tiny": lambda rng, number: rng.integers(1, 6, number),
    "chats": lambda rng, number: rng.lognormal(3, 0.8, number).clip(2, 100).astype(np.int64),
    "mixed": lambda rng, number: rng.lognormal(3.5, 1, number).clip(2, 512).astype(np.int64),
}


def places(shares, run: int = RUN, seed: int = 0) -> Places:
    """Sources whose packs cost more the later they come, with some overlap."""
    return Places([np.arange(50) + 20 * place for place in range(len(shares))], shares, run=run, seed=seed)


def windows(amounts: np.ndarray, size: int = BLOCK) -> np.ndarray:
    """(windows, sources): sums of `amounts` (packs, sources) over every `size` in a row."""
    before = np.concatenate([np.zeros((1, amounts.shape[1])), np.cumsum(amounts, axis=0)])
    return before[size:] - before[:-size]


def tokens_by_source(mixed: Mixture, epochs, lengths: np.ndarray, starts: list[int]) -> np.ndarray:
    """(packs, sources)"""
    found = []
    for packs in map(mixed.packs, epochs):
        sources = np.searchsorted(starts, packs.documents[packs.edges[:-1]], side="right") - 1
        found.append(np.eye(len(starts) - 1)[sources] * packs.sizes(lengths)[:, None])
    return np.concatenate(found)


def worst(tokens: np.ndarray, weights) -> float:
    """How far the share of any source in any 1,000 packs in a row is from what its weight says."""
    found = windows(tokens)
    return float(np.abs(found / found.sum(1, keepdims=True) - np.array(weights) / sum(weights)).max())


def build(weights, parts, *, seed: int = 0, pack: bool = True, max_length: int = 512):
    lengths, starts = np.concatenate(parts), [0, *np.cumsum([len(part) for part in parts]).tolist()]
    return Mixture(weights, starts, lengths, max_length, seed=seed, pack=pack), lengths, starts


@given(SHARES)
def test_whole_shares_add_up_and_are_near_what_was_asked(shares):
    whole = whole_shares(shares)
    asked = BLOCK * np.array(shares) / sum(shares)
    assert sum(whole) == pytest.approx(BLOCK)
    others = np.delete(np.abs(whole - asked), np.argmax(asked))
    assert (others <= NEAR + ALIKE * np.delete(asked, np.argmax(asked)) * len(shares)).all()
    near = [number for number in whole if 0 < abs(number - round(number)) < 0.99 * min(NEAR, ALIKE * number)]
    assert all(number == pytest.approx(round(number)) for number in near)


@settings(max_examples=12, deadline=None)
@given(SHARES, st.integers(0, 4 * BLOCKS), st.sampled_from([1, RUN]))
def test_any_thousand_packs_hold_each_source_to_within_one_pack(shares, block, run):
    made = places(shares, run)
    sources, _ = made.sources(block * BLOCK, (block + 8) * BLOCK)
    off = windows(np.eye(len(shares))[sources]) - np.maximum(made.average, 1 / BLOCKS)
    assert np.abs(off).max() < 1 + len(shares) / BLOCKS


@settings(max_examples=12, deadline=None)
@given(SHARES)
def test_in_the_long_run_no_source_falls_behind(shares):
    made = places(shares)
    for block in (BLOCKS // 3, BLOCKS, 2 * BLOCKS, 2 * BLOCKS + 7, 5 * BLOCKS + 1):
        _, before = made.sources(block * BLOCK, block * BLOCK)
        asked = block * np.maximum(made.average, 1 / BLOCKS)
        assert np.abs(before - asked).max() < len(shares) * (1 + block / BLOCKS)


@settings(max_examples=12, deadline=None)
@given(SHARES, st.integers(0, 5000), st.integers(0, 3000), st.integers(0, 3 * BLOCKS))
def test_a_later_piece_is_the_same_piece(shares, first, number, block):
    """Resuming asks for an epoch without those before it; so the blocks before it may be many."""
    made, first = places(shares), first + block * BLOCK
    whole, before_all = made.sources(block * BLOCK, first + number)
    piece, before = made.sources(first, first + number)
    assert np.array_equal(piece, whole[first - block * BLOCK :])
    assert np.array_equal(before - before_all, np.bincount(whole[: first - block * BLOCK], minlength=len(shares)))
    ranks = [made.ranks(source, int(before[source]), int((piece == source).sum())) for source in range(len(shares))]
    where = np.empty(number, np.int64)
    for source, its_ranks in enumerate(ranks):
        where[piece == source] = its_ranks
    assert all(sorted(where[start : start + BLOCK]) == list(range(BLOCK)) for start in range(number - BLOCK + 1)[:3])


@pytest.mark.parametrize("number", [1, 2, 125, 1000])
def test_an_even_order_has_every_number_once_and_no_part_without_large_ones(number):
    for seed in range(3):
        order = even_order(number, seed)
        assert sorted(order.tolist()) == list(range(number))
        for size in (number // 10, number // 3):
            assert all(abs(part.mean() - number / 2) < 2 * number / size for part in chunks(order, size))


def chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values) - size + 1, size)] if size else []


def mixture(weights=(0.7, 0.3), numbers=(900, 4000), *, seed=0, pack=True, max_length=512) -> Mixture:
    lengths = np.random.default_rng(5).integers(10, 400, sum(numbers))
    starts = [0, *np.cumsum(numbers).tolist()]
    return Mixture(weights, starts, lengths, max_length, seed=seed, pack=pack)


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_as_many_packs_of_documents_that_fit(pack):
    mixed = mixture(pack=pack)
    lengths = np.random.default_rng(5).integers(10, 400, 4900)
    for epoch in range(4):
        packs = mixed.packs(epoch)
        assert len(packs) == mixed.num_packs
        assert packs.sizes(lengths).max() <= 512
        assert packs.sizes(lengths).min() > 0
        sources = [{int(document >= 900) for document in packs[place]} for place in range(len(packs))]
        assert all(len(found) == 1 for found in sources), "a pack holds one source"


def test_each_round_takes_every_document_of_its_source_as_often():
    """Through the epochs a source is gone through again and again; no document runs ahead by more than one round."""
    mixed = mixture()
    documents = np.concatenate([mixed.packs(epoch).documents for epoch in range(8)])
    counts = np.bincount(documents, minlength=4900)
    for start, end in pairwise([0, 900, 4900]):
        assert counts[start:end].max() - counts[start:end].min() <= 1
    assert counts[:900].mean() > 8 > counts[900:].mean() > 1


def test_a_tiny_source_is_repeated_evenly():
    mixed = mixture(weights=(0.5, 0.5), numbers=(3, 4000))
    counts = Counter(mixed.packs(0).documents[mixed.packs(0).documents < 3].tolist())
    assert len(counts) == 3
    assert min(counts.values()) > 400
    assert max(counts.values()) - min(counts.values()) <= 200  # within one round, of which each takes 64 packs or more


@settings(max_examples=12, deadline=None)
@given(WEIGHTS, st.data(), st.integers(0, 200))
def test_any_thousand_packs_hold_the_weights_to_a_tenth_of_a_percent(weights, data, seed):
    """However long the documents and however few; a source that fills its packs badly is the next test's."""
    rng = np.random.default_rng(seed)
    kinds = [data.draw(st.sampled_from(["long", "tiny", "chats"])) for _ in weights]
    parts = [KINDS[kind](rng, data.draw(st.sampled_from([1, 7, 100, 3000]))) for kind in kinds]
    mixed, lengths, starts = build(weights, parts, seed=seed)
    first = data.draw(st.integers(0, 30))
    epochs = range(first, first + min(200, -(-3000 // mixed.num_packs)))
    tokens = tokens_by_source(mixed, epochs, lengths, starts)
    if len(tokens) > BLOCK:
        assert worst(tokens, weights) <= 0.001


@pytest.mark.parametrize(
    ("weights", "kinds", "most"),
    [
        ((0.7, 0.3), ["mixed", "mixed"], 0.0005),
        ((0.503, 0.299, 0.198), ["mixed", "chats", "mixed"], 0.0005),
        ((1, 0.01), ["mixed", "mixed"], 0.0005),
        ((99, 1), ["chats", "long"], 0.0005),
        ((0.5, 0.5), ["long", "tiny"], 0.001),
        (range(1, 11), ["mixed"] * 10, 0.001),
    ],
)
def test_the_tokens_have_the_weights_as_shares(weights, kinds, most):
    parts = [KINDS[kind](np.random.default_rng(place), 6000) for place, kind in enumerate(kinds)]
    mixed, lengths, starts = build(weights, parts, seed=3)
    tokens = tokens_by_source(mixed, range(-(-4000 // mixed.num_packs)), lengths, starts)
    assert worst(tokens, weights) <= most
    assert tokens.sum() / len(tokens) / 512 > (0.98 if "long" in kinds else 0.998)  # a long document has its pack alone


def test_sources_that_fill_their_packs_badly_are_off_by_little_more_than_a_pack():
    rng = np.random.default_rng(0)
    for number in (60, 500, 4000):
        parts = [rng.integers(300, 513, number), KINDS["chats"](rng, 20_000), rng.integers(260, 340, number)]
        mixed, lengths, starts = build((5, 4, 3), parts)
        tokens = tokens_by_source(mixed, range(-(-4000 // mixed.num_packs)), lengths, starts)
        assert worst(tokens, (5, 4, 3)) < 0.0015


def test_documents_of_their_own_have_the_weights_too():
    rng = np.random.default_rng(0)
    mixed, lengths, starts = build((3, 1), [KINDS["chats"](rng, 5000), KINDS["chats"](rng, 3000)], pack=False)
    assert worst(tokens_by_source(mixed, range(2), lengths, starts), (3, 1)) < 0.0025


@pytest.mark.parametrize("kinds", [("mixed", "mixed"), ("long", "tiny"), ("mixed", "chats")])
def test_ranks_that_meet_in_a_step_have_packs_of_like_cost_whatever_their_source(kinds):
    parts = [KINDS[kind](np.random.default_rng(place), 9000) for place, kind in enumerate(kinds)]
    mixed, lengths, _ = build((0.6, 0.4), parts)
    costs = [packs.sizes(lengths**2) for packs in (mixed.packs(0), mixed.packs(1))]
    for num_ranks in (2, 4, 8):
        steps = np.concatenate([part[: len(part) // RUN * RUN].reshape(-1, num_ranks) for part in costs])
        assert steps.max(1).sum() / steps.mean(1).sum() < 1.06


def test_a_late_epoch_packs_no_round_of_an_earlier_one(monkeypatch):
    mixed, asked = mixture(), []
    packed = mixed._packed
    monkeypatch.setattr(mixed, "_packed", lambda *given: asked.append(given[:2]) or packed(*given))
    mixed.packs(1000)
    assert len(asked) == len(set(asked)) < 12
    assert min(turn for _, turn in asked) > 300


def test_what_one_pack_lacks_is_shared():
    lengths = np.random.default_rng(0).integers(5, 60, 3001)
    packs = pack(np.sort(lengths), 512, (0,))
    lengths = np.sort(lengths)
    kept = packs.documents[: packs.edges[-2]]  # the last pack has only one document
    poor = Packs(np.append(kept, packs.documents[-1]), np.append(packs.edges[:-1], packs.edges[-2] + 1))
    shared = levelled(poor, lengths)
    assert len(shared) == len(poor)
    assert sorted(shared.documents.tolist()) == sorted(poor.documents.tolist())
    assert poor.sizes(lengths).min() < 0.2 * 512
    assert 512 * (1 - 2 / COMPANY) < shared.sizes(lengths).min() <= shared.sizes(lengths).max() <= 512
    full = Packs(np.arange(40), np.arange(41))
    assert levelled(full, np.full(40, 512)) is full


def test_packs_depend_on_the_seed_and_the_epoch_alone():
    one, other = mixture(seed=1), mixture(seed=1)
    third = one.packs(3)
    for epoch in (0, 3, 1):
        again = other.packs(epoch)
        assert np.array_equal(again.documents, one.packs(epoch).documents)
    assert np.array_equal(third.documents, mixture(seed=1).packs(3).documents)
    assert not np.array_equal(third.documents, mixture(seed=2).packs(3).documents)
    assert not np.array_equal(third.documents, one.packs(2).documents)
