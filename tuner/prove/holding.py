"""How the ranks of a proof hold its small model: as the config's strategy does, on CPUs, and in float64 if that can."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import SGD

from tuner.engine.fsdp import FullyShard
from tuner.engine.own_parts import whole
from tuner.engine.replicated import Replicated
from tuner.engine.stepping import Stepping
from tuner.engine.strategy import Batch, Strategy
from tuner.engine.zero import Zero
from tuner.engine.zero_config import HALVES, OFFLOADED, PRESETS, ZERO, read_choice
from tuner.prove.gradients import EXACT, ROUNDED, Tolerance

LARGE_RATE = 2.0**40
"""of an SGD after whose step nothing is left in a weight but its gradient, to the last bit that fp32 has of it"""


class Holding(NamedTuple):
    """Settings of a strategy, as far as they say which rank holds what."""

    fsdp: Literal["full", "hybrid"] | None = None
    deepspeed: str | None = None
    hpz_partition_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What all of it computes in: DeepSpeed adds gradients up in fp32 at most."""
        return torch.float64 if self.deepspeed is None else torch.float32

    @property
    def tolerance(self) -> Tolerance:
        """How far a gradient may be from that of float64."""
        return EXACT if self.deepspeed is None else ROUNDED

    @property
    def words(self) -> str:
        """For a person."""
        if self.fsdp is not None:
            return f"cut over the ranks by FSDP2 ({self.fsdp}), float64"
        if self.deepspeed is not None:
            return f"cut over the ranks by DeepSpeed ({self.deepspeed}), float32: its ZeRO has no float64"
        return "whole on every rank, float64"

    def strategy(self, sizes: Mapping[str, int], directory: Path) -> Strategy:
        """That of training, on CPUs; `directory` gets what DeepSpeed is told of a user's file."""
        common: dict[str, Any] = {"precision": "fp32", "sequence_parallel_size": sizes, "device": "cpu"}
        if self.deepspeed is not None:
            # a GPU would be taken for what the small model is on
            os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
            config = without_precision(self.deepspeed, directory)
            strategy = Zero(config, hpz_partition_size=self.hpz_partition_size, **common)
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of any SGD
            return strategy
        return Replicated(**common) if self.fsdp is None else FullyShard(fsdp=self.fsdp, **common)


def read_holding(strategy: Mapping[str, Any]) -> Holding:
    """What a config's strategy says of it; where ZeRO offloads to a disk, the proof takes this machine's memory."""
    return Holding(**{name: strategy.get(name) for name in Holding._fields})


def without_precision(choice: str, directory: Path) -> str:
    """A preset, or a file like the user's that says nothing of precision, of clipping, and of disks to offload to."""
    if choice in PRESETS:
        return choice
    given = {key: value for key, value in read_choice(choice).items() if key not in (*HALVES, "gradient_clipping")}
    section = dict(given[ZERO])
    for name in set(OFFLOADED) & set(section):
        section[name] = {key: value for key, value in section[name].items() if key not in ("device", "nvme_path")}
    path = directory / f"deepspeed_{os.getpid()}.json"
    path.write_text(json.dumps({**given, ZERO: section}), encoding="utf-8")
    return str(path)


def telling_optimizer(strategy: Strategy) -> dict[str, Any]:
    """The node of an optimizer whose steps `gradients_of_step` can read."""
    return {"type": SGD, "lr": 0.0 if isinstance(strategy, Stepping) else LARGE_RATE}


def gradients_of_step(strategy: Strategy, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step, over all ranks, and the whole gradient of each parameter as the optimizer gets it.

    All ranks must ask alike. The weights stay as they are.
    """
    if isinstance(strategy, Stepping):
        return seen(strategy, batches)
    assert isinstance(strategy, Zero)
    return taken(strategy, batches)


def seen(strategy: Stepping, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """What the optimizer finds at the parameters."""
    named = list(strategy.model.named_parameters())
    found: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        gradients = whole((name, parameter.grad) for name, parameter in named if parameter.grad is not None)
        found.update((name, gradient.clone()) for name, gradient in gradients)

    handle = strategy.optimizer.register_step_pre_hook(look)
    loss = strategy.train_step(batches).loss
    handle.remove()
    return loss, found


def taken(strategy: Zero, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """What SGD takes from the weights, over its rate, in float64; the weights of before are set again."""
    tensors, weights = strategy.tensors, dict(strategy.model.named_parameters())
    before = {name: tensors.whole(weight) for name, weight in weights.items()}
    loss = strategy.train_step(batches).loss
    found = {}
    for name, weight in weights.items():
        found[name] = (before[name].double() - tensors.whole(weight).double()) / LARGE_RATE
        tensors.set_part(weight, None, before[name])
    tensors.publish()
    return loss, found
