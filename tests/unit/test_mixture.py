"""Weighted sources: each has its share over any 1,000 packs, in every epoch, as a function of the seed alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.dataset.mixture import BLOCK, SCALE, Mixture, integer_rates, sources_of_packs

RATES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12)


def windows(sources: np.ndarray, num_sources: int, size: int) -> np.ndarray:
    """(windows, sources): packs of each source in every run of `size`."""
    before = np.concatenate([np.zeros((1, num_sources)), np.cumsum(np.eye(num_sources)[sources], axis=0)])
    return before[size:] - before[:-size]


@given(RATES)
def test_integer_rates_add_up_and_keep_the_proportions(rates):
    scaled = integer_rates(rates)
    assert sum(scaled) == SCALE
    assert np.abs(np.array(scaled) / SCALE - np.array(rates) / sum(rates)).max() < 1e-9


@settings(max_examples=40, deadline=None)
@given(RATES)
def test_any_thousand_packs_hold_each_source_to_within_one_pack(rates):
    scaled = integer_rates(rates)
    sources, _ = sources_of_packs(scaled, 0, 12 * BLOCK)
    off = windows(sources, len(rates), BLOCK) - BLOCK * np.array(scaled) / SCALE
    assert np.abs(off).max() < 1


@settings(max_examples=40, deadline=None)
@given(RATES)
def test_in_the_long_run_no_source_falls_behind(rates):
    scaled = integer_rates(rates)
    sources, _ = sources_of_packs(scaled, 0, 40 * BLOCK)
    ends = np.arange(1, 41) * BLOCK
    counts = np.cumsum(np.eye(len(rates))[sources], axis=0)[ends - 1]
    assert np.abs(counts - ends[:, None] * np.array(scaled) / SCALE).max() < len(rates)


@settings(max_examples=40, deadline=None)
@given(RATES, st.integers(0, 5000), st.integers(0, 3000))
def test_a_later_piece_is_the_same_piece(rates, first, number):
    """Resuming asks for an epoch without those before it."""
    scaled = integer_rates(rates)
    whole, _ = sources_of_packs(scaled, 0, first + number)
    piece, before = sources_of_packs(scaled, first, first + number)
    assert np.array_equal(piece, whole[first:])
    assert np.array_equal(before, np.bincount(whole[:first], minlength=len(rates)))


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


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (99, 1), (0.2, 0.3, 0.5)])
def test_the_tokens_have_the_weights_as_shares(weights):
    numbers = [3000, 20_000, 700][: len(weights)]
    lengths = np.clip(np.random.default_rng(1).lognormal(5, 1, sum(numbers)).astype(np.int64), 5, 1024)
    starts = [0, *np.cumsum(numbers).tolist()]
    mixed = Mixture(weights, starts, lengths, 1024, seed=3, pack=True)
    tokens = []
    for epoch in range(4):
        packs = mixed.packs(epoch)
        sources = np.searchsorted(starts, packs.documents[packs.edges[:-1]], side="right") - 1
        tokens.append(np.eye(len(weights))[sources] * packs.sizes(lengths)[:, None])
    before = np.concatenate([np.zeros((1, len(weights))), np.cumsum(np.concatenate(tokens), axis=0)])
    share = np.array(weights) / sum(weights)
    assert np.abs(before[-1] / before[-1].sum() - share).max() < 2e-4
    window = before[BLOCK:] - before[:-BLOCK]
    off = np.abs(window / window.sum(axis=1, keepdims=True) - share)
    assert off.max() < 0.002  # a pack of 1,000, and what the fullness of packs adds
    assert off.mean() < 0.0005


def test_packs_depend_on_the_seed_and_the_epoch_alone():
    one, other = mixture(seed=1), mixture(seed=1)
    third = one.packs(3)
    for epoch in (0, 3, 1):
        again = other.packs(epoch)
        assert np.array_equal(again.documents, one.packs(epoch).documents)
    assert np.array_equal(third.documents, mixture(seed=1).packs(3).documents)
    assert not np.array_equal(third.documents, mixture(seed=2).packs(3).documents)
    assert not np.array_equal(third.documents, one.packs(2).documents)
