"""However a step's documents are spread over ranks, packs, micro-batches and sequence shards, it is the same step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
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
    strategy.place(World(rank, case.num_ranks, rank, case.num_ranks), build_mesh(strategy.degrees))
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


def differences(cases: Sequence[Case], dtype: torch.dtype, placements: int) -> dict[tuple[str, str], float]:
    """The largest relative difference of the loss or of a parameter's gradient.

    Each case has some of the placements of trained tokens, by turns, and all together have each of them.
    """
    found = {}
    for turn, trained in enumerate(TRAINED):
        loss, expected = by_definition(trained)
        for case in [case for number, case in enumerate(cases) if (number + turn) % len(TRAINED) < placements]:
            result, gradients = gradients_of_a_step(case, trained, dtype)
            apart = [abs(result.loss / loss - 1)]
            for name, gradient in expected.items():
                apart.append(((gradients[name].double() - gradient).abs().max() / gradient.abs().max()).item())
            found[str(case), trained] = max(apart)
            assert result.num_tokens >= 365, "tokens of all ranks are counted, each once"
            assert result.num_loss_tokens == StepOfDocuments(trained, 1).num_loss_tokens.sum()
    return found


def compare_both(cases: Sequence[Case]) -> dict[torch.dtype, dict[tuple[str, str], float]]:
    return {dtype: differences(cases, dtype, number) for dtype, number in ((torch.float64, 2), (torch.float32, 1))}


@pytest.mark.parametrize("cases", [ONE_RANK, TWO_RANKS, FOUR_RANKS], ids=["1 rank", "2 ranks", "4 ranks"])
def test_a_step_is_the_sum_over_its_documents_wherever_they_lie(cases: list[Case]):
    num_ranks = cases[0].num_ranks
    for found in run_on_ranks(num_ranks, compare_both, cases) if num_ranks > 1 else [compare_both(cases)]:
        assert {case: apart for case, apart in found[torch.float64].items() if apart > 1e-12} == {}
        assert {case: apart for case, apart in found[torch.float32].items() if apart > 1e-5} == {}


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


def average_instead(cases: Sequence[Case]) -> dict[tuple[str, str], float]:
    with averaging():
        return differences(cases, torch.float64, len(TRAINED))


def test_dividing_by_the_world_is_caught():
    for found in run_on_ranks(2, average_instead, [Case(2, 1, 8, 4), Case(2, 2, 8)]):
        assert list(found.values()) == pytest.approx([0.5] * len(found))
