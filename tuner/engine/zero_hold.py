"""Weights on their way into ZeRO-3: taken one by one, cut over the ranks at once, whole only where they compute."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tuner.engine.together import all_or_none, from_first
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.model.hollow import parameter_places, stored_names


def take_weights(
    llm: PreTrainedModel, weights: Mapping[str, Tensor], partitioner: Any, dtype: torch.dtype, world: World
) -> dict[str, Tensor]:
    """Put a part of each parameter on this rank; the first rank reads them, so that no other opens a file.

    Args:
        llm: on the meta device; its parameters become DeepSpeed's, its persistent buffers are whole on every rank.
        weights: whole, by name.
        partitioner: a `deepspeed.zero.Init`.
        dtype: of the parameters.

    Returns:
        This rank's fp32 part, padded, of each trained parameter that `dtype` rounds.
    """
    dtypes = stored_dtypes(llm, weights, world)
    rounded = {}
    for name, places in parameter_places(llm).items():
        meta = llm.get_parameter(name)
        whole = first_has(weights, name, meta.shape, dtypes[name], partitioner.local_device, world)
        parameter = nn.Parameter(whole.to(dtype), requires_grad=meta.requires_grad)
        partitioner._convert_to_deepspeed_param(parameter)
        parameter.partition()
        if meta.requires_grad and torch.promote_types(dtypes[name], dtype) != dtype:
            part = own_part(whole, parameter.ds_tensor.ds_numel, world.rank)
            if not torch.equal(part, part.to(dtype).to(part.dtype)):
                rounded[name] = part
        for module, leaf in places:
            setattr(module, leaf, parameter)
    for name, buffer in list(llm.named_buffers()):
        if name in dtypes:
            parent, _, leaf = name.rpartition(".")
            whole = first_has(weights, name, buffer.shape, dtypes[name], partitioner.local_device, world)
            llm.get_submodule(parent).register_buffer(leaf, whole.to(buffer.dtype))
    return rounded


def stored_dtypes(llm: PreTrainedModel, weights: Mapping[str, Tensor], world: World) -> dict[str, torch.dtype]:
    """Of all that a model keeps, as the first rank has it; a failure to read is one on all ranks."""
    dtypes = None
    with all_or_none(world, (UserError, OSError, SafetensorError)):
        if world.is_first:
            dtypes = {name: weights[name].dtype for name in stored_names(llm)}
    return from_first(dtypes, world)


def first_has(
    weights: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, world: World
) -> Tensor:
    """A tensor that the first rank reads, on all ranks."""
    if world.is_first:
        whole = weights[name].to(device).contiguous()
    else:
        whole = torch.empty(shape, dtype=dtype, device=device)
    if world.size > 1:
        dist.broadcast(whole, 0)
    return whole


def own_part(whole: Tensor, size: int, rank: int) -> Tensor:
    """(size,) fp32 of the flattened tensor, padded with zeros: copied, so that the whole can go."""
    part = torch.zeros(size, dtype=torch.float32, device=whole.device)
    own = whole.flatten()[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    return part


class GatheredOnCall:
    """While it is there, each module of a cut model has its own weights whole when it is called, forward or backward.

    For what is tried out about a model before DeepSpeed's engine does the same, and better. All ranks must call alike.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                self._attach(module, own)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _attach(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        def gather(*_: Any) -> None:
            for parameter in own:
                parameter.all_gather_coalesced([parameter]).wait()  # `all_gather` would hold it twice for a moment

        def release(*_: Any) -> None:
            own[0].partition(own)

        self.handles += [
            module.register_forward_pre_hook(gather),
            module.register_forward_hook(release),
            module.register_full_backward_pre_hook(gather),
            module.register_full_backward_hook(release),
        ]
