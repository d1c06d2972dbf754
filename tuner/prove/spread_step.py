"""One step, twice: by the definition of the loss, document by document, and spread over ranks as in training."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from tuner.config import loads
from tuner.dataset.sampler import StepSampler
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import Batch, Strategy
from tuner.engine.world import World
from tuner.method.sft import SFT
from tuner.parallel.mesh import Degrees, build_mesh
from tuner.prove.documents import Step
from tuner.prove.gradients import Difference, compare
from tuner.prove.holding import Holding, gradients_of_step, telling_optimizer
from tuner.prove.small_model import Float64, build_small


class Job(NamedTuple):
    """What each rank is told."""

    source: str  # text of the config
    name: str
    model: Path  # directory of the small model; the expected gradients lie in it
    attention: str
    degrees: Degrees
    holding: Holding
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
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return total, {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def expected_path(model: Path, placement: str) -> Path:
    """Where the gradients by definition lie."""
    return model / f"expected_{placement}.pt"


def outcomes_on_rank(job: Job) -> dict[str, Outcome]:
    """Do the steps of a job as this rank of the process group."""
    config = loads(job.source, job.name)
    rank, size = dist.get_rank(), dist.get_world_size()
    tell_rank(rank, size)
    strategy = job.holding.strategy(job.degrees._asdict(), job.model)
    strategy.place(World(rank, size, rank, size), build_mesh(job.degrees))
    method = build_small(config, job.model, attention=job.attention, dtype=job.holding.dtype)
    if job.degrees.size > 1:
        method.cut_sequences(strategy.mesh)
    strategy.prepare(
        method,
        optim_wrapper={"optimizer": telling_optimizer(strategy)},
        param_scheduler=WarmupCosine(warmup_ratio=0, min_lr_ratio=1),
        num_steps=len(job.steps),
    )
    outcomes = {}
    for placement, step in job.steps.items():
        with Float64() if job.holding.dtype == torch.float64 else nullcontext():
            loss, found = gradients_of_step(strategy, batches_of_rank(strategy, step, job.scale_loss))
        expected = torch.load(expected_path(job.model, placement), weights_only=True)
        outcomes[placement] = Outcome(loss, compare(found, expected, job.holding.tolerance))
    return outcomes


def tell_rank(rank: int, size: int) -> None:
    """Say in the environment what launchers say there, for libraries that look for it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, size, rank, size))))


def batches_of_rank(strategy: Strategy, step: Step, scale_loss: float) -> Sequence[Batch]:
    """The micro-batches of this rank."""
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
    return batches
