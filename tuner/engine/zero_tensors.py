"""Whole tensors out of what ZeRO spreads over the ranks, and back: one at a time, exactly, for checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuner.engine.deepspeed_package import load_deepspeed
from tuner.engine.zero_hold import own_part

STEP = "step"  # the one state of Adam that is a number, of a whole partition


class Part(NamedTuple):
    """What this rank holds of a flattened tensor."""

    values: Tensor  # (n,) fp32
    start: int  # place of the first in the flattened tensor


class SpreadTensors(ABC):
    """fp32 weights and optimizer state of trained parameters, as a ZeRO optimizer keeps them.

    Args:
        optimizer: `engine.optimizer` of DeepSpeed.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.base: torch.optim.Optimizer = optimizer.optimizer
        self.rank = dist.get_rank()

    @property
    @abstractmethod
    def offloaded(self) -> bool:
        """Whether the optimizer works on the CPU while the model is on a GPU."""

    @abstractmethod
    def partitions(self) -> Iterator[Tensor]:
        """The flat fp32 tensors that the optimizer changes on this rank."""

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""

    @abstractmethod
    def part(self, parameter: nn.Parameter, key: str | None) -> Part | None:
        """This rank's part of a parameter's fp32 weight, or of its optimizer state `key`; None where it has none."""

    @abstractmethod
    def set_part(self, parameter: nn.Parameter, key: str | None, whole: Tensor) -> None:
        """Keep this rank's part of `whole`."""

    @abstractmethod
    def publish(self) -> None:
        """Bring the weights that the model computes with up to date with the fp32 ones."""

    def whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The parameter's fp32 weight or state, gathered from all ranks, bit by bit; all ranks must call it."""
        shape = self.shape(parameter)
        buffer = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        part = self.part(parameter, key)
        if part is not None:
            buffer.narrow(0, part.start, len(part.values)).copy_(part.values)
        dist.all_reduce(buffer.view(torch.int32))  # as integers: each is zero on all ranks but one
        return buffer.view(shape)

    def keys(self) -> list[str]:
        """Names of the optimizer's states but `STEP`; none before the first step."""
        return sorted({key for flat in self.partitions() for key in self.base.state.get(flat, {})} - {STEP})

    def step(self) -> Tensor | None:
        """() fp32, how many steps the optimizer has counted; None where it counts none."""
        counts = {float(state[STEP]) for flat in self.partitions() if STEP in (state := self.base.state.get(flat, {}))}
        assert len(counts) <= 1, f"partitions of one optimizer are at the steps {counts}"
        return torch.tensor(counts.pop()) if counts else None

    def make_state(self, keys: list[str], step: Tensor | None) -> None:
        """States of zeros under `keys`, as if the optimizer had made steps."""
        for flat in self.partitions():
            state: dict[str, Tensor] = {key: torch.zeros_like(flat.data) for key in keys}
            if step is not None:
                state[STEP] = step.to(torch.float32).clone().to(flat.device if self.counts_on_device() else "cpu")
            self.base.state[flat] = state

    def counts_on_device(self) -> bool:
        """Whether torch's optimizer wants its step counter beside the weights."""
        return any(group.get("fused") or group.get("capturable") for group in self.base.param_groups)


class Flat(SpreadTensors):
    """Stages 1 and 2: each group of parameters is one flat tensor, cut into as many parts as there are ranks."""

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer works on the CPU while the model is on a GPU."""
        return bool(self.optimizer.cpu_offload)

    def partitions(self) -> Iterator[Tensor]:
        """The flat fp32 tensors that the optimizer changes on this rank."""
        yield from self.optimizer.single_partition_of_fp32_groups

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.shape

    def part(self, parameter: nn.Parameter, key: str | None) -> Part | None:
        """This rank's part of a parameter's fp32 weight, or of its optimizer state `key`; None where it has none."""
        if not parameter.requires_grad:
            return Part(parameter.detach().flatten(), 0) if self.rank == 0 else None
        place = parameter._hp_mapping
        if place is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[place.param_group_index]
        values = flat if key is None else self.base.state[flat][key]
        here = place.hp_fragment_address
        return Part(values.detach().narrow(0, here.start, here.numel), place.lp_fragment_address.start)

    def set_part(self, parameter: nn.Parameter, key: str | None, whole: Tensor) -> None:
        """Keep this rank's part of `whole`."""
        if not parameter.requires_grad:
            parameter.data.copy_(whole)
        elif (part := self.part(parameter, key)) is not None:
            part.values.copy_(whole.flatten().narrow(0, part.start, len(part.values)))

    def publish(self) -> None:
        """Bring the weights that the model computes with up to date with the fp32 ones."""
        self.optimizer.update_lp_params()


class Partitioned(SpreadTensors):
    """Stage 3: each parameter is cut into as many parts as there are ranks; the last is padded."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.api = load_deepspeed().utils

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer works on the CPU while the model is on a GPU."""
        return bool(self.optimizer.offload_optimizer)

    def partitions(self) -> Iterator[Tensor]:
        """The flat fp32 tensors that the optimizer changes on this rank."""
        yield from self.optimizer.fp32_partitioned_groups_flat

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.ds_shape

    def part(self, parameter: nn.Parameter, key: str | None) -> Part | None:
        """This rank's part of a parameter's fp32 weight, or of its optimizer state `key`; None where it has none."""
        if not parameter.requires_grad:
            values = parameter.ds_tensor
        elif key is None:
            values = self.api.safe_get_local_fp32_param(parameter)
        else:
            values = self.api.safe_get_local_optimizer_state(parameter, key)
        start = self.rank * len(values)
        real = max(0, min(len(values), parameter.ds_numel - start))
        return Part(values.detach()[:real], start) if real else None

    def set_part(self, parameter: nn.Parameter, key: str | None, whole: Tensor) -> None:
        """Keep this rank's part of `whole`."""
        self.set_own(parameter, key, own_part(whole, parameter.ds_tensor.ds_numel, self.rank))

    def set_own(self, parameter: nn.Parameter, key: str | None, values: Tensor) -> None:
        """Keep `values`: this rank's part, padded."""
        if not parameter.requires_grad:
            parameter.ds_tensor.data.copy_(values)
        elif key is None:
            self.api.safe_set_local_fp32_param(parameter, values)
        else:
            self.api.safe_set_local_optimizer_state(parameter, values, key)

    def publish(self) -> None:
        """Bring the weights that the model computes with up to date with the fp32 ones."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for place in range(len(optimizer.fp16_groups)):
            swapped = optimizer._swappable_optimizer_subgroup(place)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_in(place)
            optimizer._reassign_or_swap_out_partitioned_parameters(place)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(place)
        optimizer._post_step(set())
