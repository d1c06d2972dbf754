"""The sampler: every pack once an epoch, ranks in step, and any step known without those before it."""

import numpy as np
import pytest

from tuner.dataset.packing import pack
from tuner.dataset.sampler import StepSampler
from tuner.errors import UserError


class Corpus:
    """Documents by length alone; every second token of each is a label."""

    def __init__(self, num_documents: int = 23, max_length: int = 10, seed: int = 0) -> None:
        self.lengths = np.random.default_rng(seed).integers(2, max_length, num_documents)
        self.num_loss_tokens = np.maximum(1, self.lengths // 2)
        self.max_length = max_length
        self.num_packs = len(self.packs(0))

    def packs(self, epoch: int):
        return pack(self.lengths, self.max_length, (7, epoch))


def plans(corpus, rank=0, num_ranks=1, accumulate=3, **options):
    return list(StepSampler(corpus, num_accumulation_steps=accumulate, rank=rank, num_ranks=num_ranks, **options))


@pytest.mark.parametrize("num_documents", [1, 2, 5, 23, 24, 40])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_each_epoch_takes_every_document_once_and_ranks_agree(num_documents, num_ranks, accumulate):
    corpus = Corpus(num_documents)
    ranks = [plans(corpus, rank, num_ranks, accumulate, num_epochs=2) for rank in range(num_ranks)]
    seen = {0: [], 1: []}
    for step, per_rank in enumerate(zip(*ranks, strict=True)):
        assert {plan.step for plan in per_rank} == {step}
        assert len({plan.epoch for plan in per_rank}) == 1
        assert len({len(plan.packs) for plan in per_rank}) == 1, "ranks must run as many micro-batches"
        assert 1 <= len(per_rank[0].packs) <= accumulate
        documents = [document for plan in per_rank for documents in plan.packs for document in documents]
        labels = int(corpus.num_loss_tokens[documents].sum())
        assert {plan.num_loss_tokens for plan in per_rank} == {labels}
        assert labels > 0
        seen[per_rank[0].epoch] += documents
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(num_documents))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_weighted_step_counts_the_weights_of_all_ranks_and_a_plain_one_is_an_int(num_ranks):
    corpus = Corpus(23)
    assert {type(plan.num_loss_tokens) for plan in plans(corpus, 0, num_ranks)} == {int}
    corpus.num_loss_tokens = corpus.num_loss_tokens * 0.1 + 0.3
    for per_rank in zip(*(plans(corpus, rank, num_ranks) for rank in range(num_ranks)), strict=True):
        documents = [document for plan in per_rank for documents in plan.packs for document in documents]
        totals = {plan.num_loss_tokens for plan in per_rank}
        assert len(totals) == 1, "ranks agree to the last bit"
        total = totals.pop()
        assert type(total) is float
        assert total == pytest.approx(sum(corpus.num_loss_tokens[documents].tolist()), rel=1e-14)


def test_at_most_one_micro_batch_of_a_rank_is_empty_in_an_epoch():
    corpus = Corpus(23)
    empty = [sum(packs == () for plan in plans(corpus, rank, 4) for packs in plan.packs) for rank in range(4)]
    assert max(empty) <= 1
    assert sum(empty) == -corpus.num_packs % 4


def test_seeking_gives_the_same_steps_as_walking():
    corpus = Corpus()
    sampler = StepSampler(corpus, num_accumulation_steps=2, num_epochs=3)
    walked = list(sampler)
    for step in (0, 1, sampler.steps_per_epoch, len(walked) - 1, len(walked)):
        sampler.seek(step)
        assert list(sampler) == walked[step:]
    assert sampler.plan(5) == walked[5]
    assert len(sampler) == len(walked) == 3 * sampler.steps_per_epoch


def test_epochs_differ_and_depend_on_nothing_before_them():
    corpus = Corpus()
    sampler = StepSampler(corpus, num_accumulation_steps=1, num_epochs=2)
    first, second = (sampler.plan(epoch * sampler.steps_per_epoch).packs for epoch in (0, 1))
    assert first != second
    assert StepSampler(Corpus(), num_accumulation_steps=1, num_epochs=2).plan(sampler.steps_per_epoch).packs == second


def test_max_steps_takes_the_place_of_epochs_and_may_reach_beyond_one():
    corpus = Corpus()
    per_epoch = len(plans(corpus))
    steps = plans(corpus, max_steps=2 * per_epoch + 1, num_epochs=1)
    assert [plan.epoch for plan in steps] == [0] * per_epoch + [1] * per_epoch + [2]
    assert len(plans(corpus, max_steps=1, num_epochs=5)) == 1


def test_a_step_asks_for_no_epoch_but_its_own():
    corpus = Corpus()
    sampler = StepSampler(corpus, num_accumulation_steps=2, num_epochs=1000)
    asked = []
    corpus_packs = corpus.packs
    corpus.packs = lambda epoch: asked.append(epoch) or corpus_packs(epoch)
    sampler.plan(500 * sampler.steps_per_epoch)
    assert asked == [500]


@pytest.mark.parametrize("wrong", [{"num_epochs": 0}, {"max_steps": 0}, {"accumulate": 0}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(UserError, match="at least 1"):
        plans(Corpus(), **wrong)


def test_seeking_outside_the_run_is_refused():
    with pytest.raises(UserError, match="Step 9999"):
        StepSampler(Corpus(), num_accumulation_steps=1).seek(9999)
