"""However a step's documents are spread over ranks, packs, micro-batches and sequence shards, it is the same step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import by_turns, run_on_ranks
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from tuner.dataset.collate import collate_packs
from tuner.dataset.packing import Packs
from tuner.dataset.sampler import StepPlan, StepSampler
from tuner.dataset.tokenize import Document
from tuner.engine import replicated
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import StepResult
from tuner.engine.world import World
from tuner.method.sft import SFT
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.parallel.mesh import build_mesh

SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TRAINED = {
    "every token": lambda document, place, length: True,
    "the end of the last document": lambda document, place, length: document == 0 and place >= length - 3,
    "every third document": lambda document, place, length: document % 3 == 0,
    "one token of the step": lambda document, place, length: (document, place) == (5, 1),
}
NUM_PACKS = 8  # of the step, whoever takes them
mesh_of = cache(build_mesh)


class Case(NamedTuple):
    """Where the step is done."""

    num_ranks: int
    sequence_parallel: int | dict[str, int]  # of these
    num_packs: int = NUM_PACKS  # that the documents are in
    num_accumulation_steps: int = 8

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks, sp {self.sequence_parallel}, {self.num_packs} packs"


ONE_RANK = [Case(1, 1, 1), Case(1, 1, 8), Case(1, 1, 5)]
TWO_RANKS = [
    Case(2, 1, 8, 4),
    Case(2, 1, 7, 4),
    Case(2, 1, 1, 1),
    Case(2, 2, 8),
    Case(2, 2, 1),
    Case(2, {"ring": 2}, 3),
]
FOUR_RANKS = [
    Case(4, 1, 8, 2), Case(4, 1, 5, 2), Case(4, 2, 8, 4), Case(4, 2, 3, 2), Case(4, 4, 8), Case(4, 4, 1),
    Case(4, {"ring": 2}, 3, 2), Case(4, {"ulysses": 2, "ring": 2}, 8), Case(4, {"ring": 4}, 2),
]  # fmt: skip


class StepOfDocuments:
    """A dataset whose first epoch is one step; some documents have one token, one has two hundred."""

    def __init__(self, trained: str, num_packs: int) -> None:
        rng = np.random.default_rng(0)
        lengths = [1, 200, 1, 9, 30, 4, 2, 17, 1, 26, 8, 3, 12, 40, 5, 6]
        self.documents = []
        for number, length in enumerate(lengths):
            marks = [TRAINED[trained](number if length < 200 else 0, place, length) for place in range(length)]
            self.documents.append(Document(rng.integers(1, 60, length).astype(np.uint32), np.array(marks)))
        self.num_packs = num_packs
        self.num_loss_tokens = np.array([int(document.trained[1:].sum()) for document in self.documents])

    def packs(self, epoch: int) -> Packs:
        edges = np.linspace(0, len(self.documents), self.num_packs + 1).astype(np.int64)
        return Packs(np.arange(len(self.documents)), edges)

    def batches(self, plan: StepPlan, num_parts: int) -> list:
        return collate_packs(plan.packs, self.documents.__getitem__, plan.num_loss_tokens, num_parts)


def make_method(dtype: torch.dtype) -> SFT:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(InternLM2Config(**SIZES), attn_implementation="tuner_sdpa")
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return SFT(llm.to(dtype))


def gradients_of_a_step(case: Case, trained: str, dtype: torch.dtype) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """What the optimizer is given."""
    rank = dist.get_rank() if case.num_ranks > 1 else 0
    strategy = Replicated(precision="fp32", sequence_parallel_size=case.sequence_parallel, device="cpu")
    strategy.place(World(rank, case.num_ranks, rank, case.num_ranks), mesh_of(strategy.degrees))
    num_parts, method = strategy.degrees.size, make_method(dtype)
    if num_parts > 1:
        method.cut_sequences(strategy.mesh)
    strategy.prepare(
        method,
        optim_wrapper={"optimizer": {"type": SGD, "lr": 1.0}},
        param_scheduler=WarmupCosine(warmup_ratio=0, min_lr_ratio=1),
        num_steps=10**9,
    )
    gradients: dict[str, torch.Tensor] = {}
    strategy.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: parameter.grad.clone() for name, parameter in method.named_parameters()})
    )
    dataset = StepOfDocuments(trained, case.num_packs)
    sampler = StepSampler(
        dataset,
        num_accumulation_steps=case.num_accumulation_steps,
        rank=rank // num_parts,
        num_ranks=case.num_ranks // num_parts,
    )
    assert len(sampler) == 1
    result = strategy.train_step(dataset.batches(sampler.plan(0), num_parts))
    return result, gradients


def by_definition(trained: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Each document alone through the model, all logits kept: -log p summed over the labels, over their number."""
    method, dataset = make_method(torch.float64), StepOfDocuments(trained, 1)
    total = torch.zeros((), dtype=torch.float64)
    for document in dataset.documents:
        ids = torch.from_numpy(document.ids.astype(np.int64))[None]
        logits = method.llm(ids, use_cache=False).logits[0].log_softmax(-1)
        for place in np.flatnonzero(document.trained[1:]).tolist():
            total = total - logits[place, ids[0, place + 1]]
    loss = total / int(dataset.num_loss_tokens.sum())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in method.named_parameters()}


class Found(NamedTuple):
    """The largest relative difference of the loss or of a parameter's gradient, by case and by what is trained."""

    exact: dict[tuple[str, str], float]  # in float64
    single: dict[tuple[str, str], float]  # in float32


def compare_both(cases: Sequence[Case], placements: int) -> Found:
    """Each case with some of the placements of trained tokens, by turns, so that all together have each of them."""
    places, expected = list(TRAINED), by_turns(by_definition, TRAINED)
    found = Found({}, {})
    for number, case in enumerate(cases):
        for turn in range(placements):
            for of_dtype, dtype, shift in ((found.exact, torch.float64, 0), (found.single, torch.float32, 1)):
                trained = places[(number + turn + shift) % len(places)]
                of_dtype[str(case), trained] = difference(case, trained, dtype, *expected[trained])
    return found


def difference(case: Case, trained: str, dtype: torch.dtype, loss: float, expected: dict[str, torch.Tensor]) -> float:
    result, gradients = gradients_of_a_step(case, trained, dtype)
    apart = [abs(result.loss / loss - 1)]
    for name, gradient in expected.items():
        apart.append(((gradients[name].double() - gradient).abs().max() / gradient.abs().max()).item())
    assert result.num_tokens >= 365, "tokens of all ranks are counted, each once"
    assert result.num_loss_tokens == StepOfDocuments(trained, 1).num_loss_tokens.sum()
    return max(apart)


def assert_same(ranks: Sequence[Found], cases: Sequence[Case], placements: int) -> None:
    for found in ranks:
        assert len(found.exact) == len(found.single) == len(cases) * placements
        assert {case: apart for case, apart in found.exact.items() if not apart <= 1e-12} == {}
        assert {case: apart for case, apart in found.single.items() if not apart <= 1e-5} == {}


class TwoRanks(NamedTuple):
    """What one start of two processes finds."""

    same: Found
    averaged: list[float]


@pytest.fixture(scope="module")
def two_ranks() -> list[TwoRanks]:
    return run_on_ranks(2, look_at_two)


def look_at_two() -> TwoRanks:
    return TwoRanks(compare_both(TWO_RANKS, 1), average_instead([Case(2, 1, 8, 4), Case(2, 2, 8)]))


def test_a_step_is_the_sum_over_its_documents_however_they_are_packed():
    assert_same([compare_both(ONE_RANK, len(TRAINED))], ONE_RANK, len(TRAINED))


def test_a_step_is_the_sum_over_its_documents_on_two_ranks(two_ranks: list[TwoRanks]):
    assert_same([found.same for found in two_ranks], TWO_RANKS, 1)


@pytest.mark.slow
def test_a_step_is_the_sum_over_its_documents_on_four_ranks():
    assert_same(run_on_ranks(4, compare_both, FOUR_RANKS, 1), FOUR_RANKS, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [TWO_RANKS, FOUR_RANKS], ids=["2 ranks", "4 ranks"])
def test_so_it_is_with_each_placement_of_what_is_trained(cases: list[Case]):
    assert_same(run_on_ranks(cases[0].num_ranks, compare_both, cases, len(TRAINED)), cases, len(TRAINED))


@contextmanager
def averaging() -> Iterator[None]:
    """The mean over ranks, as DDP itself makes it."""

    def mean_of_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return exact(state, bucket).then(lambda future: future.value() / dist.get_world_size())

    exact = replicated.sum_bucket
    replicated.sum_bucket = mean_of_bucket
    try:
        yield
    finally:
        replicated.sum_bucket = exact


def average_instead(cases: Sequence[Case]) -> list[float]:
    expected = by_turns(by_definition, TRAINED)
    with averaging():
        return [
            difference(case, trained, torch.float64, *expected[trained])
            for case in cases
            for trained in list(TRAINED)[:2]
        ]


def test_dividing_by_the_world_is_caught(two_ranks: list[TwoRanks]):
    for found in two_ranks:
        assert found.averaged == pytest.approx([0.5] * 4)
