"""Weights on their way into FSDP2: a layer is read when it is called, and then row by row; no rank holds all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tuner.engine.own_parts import own_rows
from tuner.engine.world import World
from tuner.engine.zero_hold import first_has, stored_dtypes
from tuner.model.hollow import parameter_places


class LentWeights:
    """Weights of a model whose layers have none: what no layer has is there, a layer's come while it computes.

    For what is tried out about a model before its weights are cut. All ranks must call alike: the first one reads.

    Args:
        llm: on the meta device; its parameters are replaced by fp32 ones on `device`.
        layers: of `llm`.
        weights: whole, by name.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        layers: Iterable[nn.Module],
        weights: Mapping[str, Tensor],
        *,
        device: torch.device,
        world: World,
    ) -> None:
        self._weights, self._device, self._world = weights, device, world
        self._dtypes = stored_dtypes(llm, weights, world)
        self._names: dict[nn.Parameter, str] = {}
        self._places = parameter_places(llm)
        self._handles: list[RemovableHandle] = []
        for name, places in self._places.items():
            meta = llm.get_parameter(name)
            parameter = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
            give_back([parameter])
            self._names[parameter] = name
            for module, leaf in places:
                setattr(module, leaf, parameter)
        self._take_buffers(llm)
        for layer in layers:
            self._attach(layer)
        borrowed = {parameter for layer in layers for parameter in layer.parameters()}
        self.borrow(parameter for parameter in self._names if parameter not in borrowed)

    def borrow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Read those that are not there."""
        for parameter in parameters:
            storage = parameter.untyped_storage()
            if storage.size() == 0:
                storage.resize_(parameter.numel() * parameter.element_size())
                parameter.data.copy_(self._read(self._names[parameter], parameter))  # unseen by autograd

    def end(self) -> None:
        """From now on calls read nothing, and of every weight only its shape is left: it is on the meta device."""
        for handle in self._handles:
            handle.remove()
        for parameter, name in self._names.items():
            self._put(name, torch.empty_like(parameter, device="meta"))
        self._names = {}

    def fill(self) -> None:
        """Give the weights, which were cut on the meta device, this rank's rows, reading one after the other."""
        for name, [(module, leaf), *_] in self._places.items():
            cut = getattr(module, leaf)
            assert isinstance(cut, DTensor)
            own = self._read(name, cut)[own_rows(cut)].to(cut.dtype, copy=True)
            layout = {"shape": cut.shape, "stride": cut.stride(), "run_check": False}
            self._put(name, DTensor.from_local(own, cut.device_mesh, cut.placements, **layout))

    def _put(self, name: str, tensor: Tensor) -> None:
        """In all places of a weight."""
        module, leaf = self._places[name][0]
        parameter = nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad)
        for module, leaf in self._places[name]:
            setattr(module, leaf, parameter)

    def _read(self, name: str, like: Tensor) -> Tensor:
        return first_has(self._weights, name, like.shape, self._dtypes[name], self._device, self._world)

    def _take_buffers(self, llm: PreTrainedModel) -> None:
        for name, buffer in list(llm.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            is_stored = name in self._dtypes
            value = self._read(name, buffer).to(buffer.dtype) if is_stored else buffer.to(self._device)
            llm.get_submodule(parent).register_buffer(leaf, value, persistent=is_stored)

    def _attach(self, layer: nn.Module) -> None:
        own = list(layer.parameters())

        def take(*_: Any) -> None:
            self.borrow(own)

        def release(*_: Any) -> None:
            give_back(own)

        hooks: list[Callable[[Callable[..., None]], RemovableHandle]] = [
            layer.register_forward_pre_hook,
            layer.register_forward_hook,
            layer.register_full_backward_pre_hook,
            layer.register_full_backward_hook,
        ]
        self._handles += [hook(action) for hook, action in zip(hooks, (take, release, take, release))]


def give_back(parameters: Iterable[nn.Parameter]) -> None:
    """Free the memory of weights; shapes stay, and graphs that have saved them find them again once they are read."""
    for parameter in parameters:
        parameter.untyped_storage().resize_(0)
