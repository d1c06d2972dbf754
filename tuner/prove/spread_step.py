"""One step, twice: by the definition of the loss, document by document, and spread over ranks as in training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import SGD

from tuner.config import loads
from tuner.dataset.sampler import StepSampler
from tuner.engine.fsdp import FullyShard
from tuner.engine.own_parts import whole
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.stepping import Stepping
from tuner.engine.world import World
from tuner.method.sft import SFT
from tuner.parallel.mesh import Degrees, build_mesh
from tuner.prove.documents import Step
from tuner.prove.gradients import Difference, Gradients, compare
from tuner.prove.small_model import Float64, build_small


class Job(NamedTuple):
    """What each rank is told."""

    source: str  # text of the config
    name: str
    model: Path  # directory of the small model; the expected gradients lie in it
    attention: str
    degrees: Degrees
    fsdp: Literal["full", "hybrid"] | None  # how FSDP2 cuts the weights; None has them whole on every rank
    steps: Mapping[str, Step]  # by where the trained tokens lie
    scale_loss: float  # 1; another number is a mistake made on purpose


class Outcome(NamedTuple):
    """Of a step: its loss, and how its gradients differ from those by definition."""

    loss: float
    differences: list[Difference]


def by_definition(method: SFT, step: Step) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the sum over documents of -log p of each label, over the number of labels.

    Each document goes through the model alone and whole, and all its logits are kept.
    """
    method.zero_grad()
    total = 0.0
    num_loss_tokens = float(step.num_loss_tokens.sum())
    for document in step.documents:
        places = torch.from_numpy(np.flatnonzero(document.trained[1:]))
        if not len(places):
            continue
        ids = torch.from_numpy(document.ids.astype(np.int64))
        weights = torch.ones(len(places), dtype=torch.float64)
        if document.weights is not None:
            weights = torch.from_numpy(document.weights[1:].astype(np.float64))[places]
        log_probabilities = method.llm(ids[None], use_cache=False).logits[0, places].log_softmax(-1)
        losses = -log_probabilities.gather(1, ids[1:][places, None])[:, 0]
        loss = (losses * weights).sum() / num_loss_tokens
        loss.backward()
        total += loss.item()
    return total, gradients_of(method)


def gradients_of(method: SFT) -> dict[str, torch.Tensor]:
    """A copy of what each parameter has, whole; where ranks have rows of it, all of them must ask."""
    named = method.named_parameters()
    return {name: grad.clone() for name, grad in whole((n, p.grad) for n, p in named if p.grad is not None)}


def expected_path(model: Path, placement: str) -> Path:
    """Where the gradients by definition lie."""
    return model / f"expected_{placement}.pt"


def outcomes_on_rank(job: Job) -> dict[str, Outcome]:
    """Do the steps of a job as this rank of the process group."""
    config = loads(job.source, job.name)
    rank, size = dist.get_rank(), dist.get_world_size()
    strategy = choose_strategy(job)
    strategy.place(World(rank, size, rank, size), build_mesh(job.degrees))
    method = build_small(config, job.model, attention=job.attention, dtype=torch.float64)
    if job.degrees.size > 1:
        method.cut_sequences(strategy.mesh)
    strategy.prepare(
        method,
        optim_wrapper={"optimizer": {"type": SGD, "lr": 0.0}},
        param_scheduler=WarmupCosine(warmup_ratio=0, min_lr_ratio=1),
        num_steps=len(job.steps),
    )
    found: dict[str, torch.Tensor] = {}
    strategy.optimizer.register_step_pre_hook(lambda *_: found.update(gradients_of(method)))
    outcomes = {}
    for placement, step in job.steps.items():
        loss = do_step(strategy, step, job.scale_loss)
        expected: Gradients = torch.load(expected_path(job.model, placement), weights_only=True)
        outcomes[placement] = Outcome(loss, compare(found, expected))
        found.clear()
    return outcomes


def choose_strategy(job: Job) -> Stepping:
    """That of training, on a CPU; all it computes is in the dtype of the model."""
    sizes = job.degrees._asdict()
    if job.fsdp is None:
        return Replicated(precision="fp32", sequence_parallel_size=sizes, device="cpu")
    return FullyShard(fsdp=job.fsdp, precision="fp32", sequence_parallel_size=sizes, device="cpu")


def do_step(strategy: Stepping, step: Step, scale_loss: float) -> float:
    """The optimizer step of this rank; returns the loss of all ranks."""
    num_parts = strategy.degrees.size
    num_replicas = strategy.world.size // num_parts
    sampler = StepSampler(
        step,
        num_accumulation_steps=-(-step.num_packs // num_replicas),
        rank=strategy.world.rank // num_parts,
        num_ranks=num_replicas,
    )
    batches = step.batches(sampler.plan(0), num_parts)
    for batch in batches:
        batch["num_loss_tokens"] /= scale_loss
    with Float64():
        return strategy.train_step(batches).loss
