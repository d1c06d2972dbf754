"""Head and loss in chunks give the gradients of whole logits, to 1e-6 in fp32: whatever trains, however it is held."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import by_turns, run_on_ranks
from test_fully_shard import MODELS
from test_one_gradient import StepOfDocuments, mesh_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.constants import IGNORE_INDEX
from tuner.dataset.sampler import StepSampler
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import Strategy
from tuner.engine.world import World
from tuner.method import loss
from tuner.method.sft import SFT
from tuner.parallel.mesh import Mesh
from tuner.prove.holding import Holding, gradients_of_step, telling_optimizer
from tuner.prove.spread_step import tell_rank

BOUND = 1e-6  # of a gradient's norm, and of the loss
CHUNK = 50  # tokens, so that there are several chunks
TRAINED = {"pre-training": "every token", "fine-tuning": "every third document"}
HELD = {"whole": Holding(), "zero3": Holding(deepspeed="zero3")}
Step = tuple[float, dict[str, torch.Tensor]]


class Case(NamedTuple):
    """What trains."""

    model: str
    trained: str
    trains_head: bool


CASES = [Case(*case) for case in product(MODELS, TRAINED, (True, False))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", CHUNK)


def make_llm(case: Case) -> PreTrainedModel:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MODELS[case.model](), attn_implementation="tuner_sdpa")
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    llm.get_output_embeddings().requires_grad_(case.trains_head)
    return llm.train()


def with_whole_logits(case: Case) -> Step:
    """By transformers' own head and torch's cross-entropy, in one batch on one process."""
    llm, dataset = make_llm(case), StepOfDocuments(TRAINED[case.trained], 1)
    (batch,) = dataset.batches(StepSampler(dataset, num_accumulation_steps=1).plan(0), 1)
    labels, count = batch.pop("labels"), batch.pop("num_loss_tokens")
    batch.pop("loss_weights", None)
    logits = llm(**batch, use_cache=False).logits[0]
    value = F.cross_entropy(logits, labels[0], ignore_index=IGNORE_INDEX, reduction="sum") / count
    value.backward()
    return value.item(), {name: own.grad for name, own in llm.named_parameters() if own.requires_grad}


def in_chunks(case: Case, strategy: Strategy) -> Step:
    """As training takes it: two packs of documents, over as many ranks as there are."""
    strategy.place(*place(strategy))
    method, num_parts = SFT(make_llm(case)), strategy.degrees.size
    assert method.head_is_product
    if num_parts > 1:
        method.cut_sequences(strategy.mesh)
    optimizer, schedule = telling_optimizer(strategy), WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(method, optim_wrapper={"optimizer": optimizer}, param_scheduler=schedule, num_steps=9)
    num_ranks = strategy.world.size // num_parts
    dataset, rank = StepOfDocuments(TRAINED[case.trained], 2), strategy.world.rank // num_parts
    sampler = StepSampler(dataset, num_accumulation_steps=2 // num_ranks, rank=rank, num_ranks=num_ranks)
    value, found = gradients_of_step(strategy, dataset.batches(sampler.plan(0), num_parts))
    trained = {f"llm.{name}" for name, own in method.llm.named_parameters() if own.requires_grad}
    if engine := getattr(strategy, "engine", None):
        engine.destroy()
    return value, {name.removeprefix("llm."): found[name] for name in found if name in trained}


def place(strategy: Strategy) -> tuple[World, Mesh]:
    if not dist.is_initialized():
        return strategy.world, strategy.mesh
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size), mesh_of(strategy.degrees)


def apart(got: Step, expected: Step) -> float:
    """The largest difference of the loss, and of a gradient by its norm."""
    assert got[1].keys() == expected[1].keys()
    of_gradients = [((got[1][name] - value).norm() / value.norm()).item() for name, value in expected[1].items()]
    return max(abs(got[0] / expected[0] - 1), *of_gradients)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_one_process(case: Case) -> None:
    got = in_chunks(case, Replicated(precision="fp32", device="cpu"))
    assert apart(got, with_whole_logits(case)) < BOUND


def on_two_ranks(directory: Path) -> dict[str, float]:
    """By what trains and how it is held."""
    loss.CHUNK_TOKENS = CHUNK
    tell_rank(dist.get_rank(), dist.get_world_size())
    expected, found = by_turns(with_whole_logits, CASES), {}
    for case, (held, holding), sp in product(CASES, HELD.items(), (1, 2)):
        strategy = holding.strategy({"ulysses": sp, "ring": 1}, directory)
        found[f"{held}, sp {sp}, {case}"] = apart(in_chunks(case, strategy), expected[case])
    return found


@pytest.mark.slow
def test_on_two_ranks_that_hold_all_or_parts_of_a_model_and_share_sequences_or_not(tmp_path: Path) -> None:
    for found in run_on_ranks(2, on_two_ranks, tmp_path, timeout=600):
        assert len(found) == 4 * len(CASES)
        assert {name: value for name, value in found.items() if not value < BOUND} == {}
