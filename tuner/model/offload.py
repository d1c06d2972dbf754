"""Activations in the host's memory: they leave while the forward goes on, and are back before backward wants them."""

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

MAX_LEAVING = 2  # tensors that may be on their way to the host while the forward goes on; then it waits for the oldest


class HostMemory:
    """Where the checkpointed activations of a model stay between forward and backward.

    On a GPU copies go over streams of their own, to and from pinned memory; the host has `host_bytes` of them at most
    at a time. On a CPU they are copies, so that what a step computes can be tested there.
    """

    def __init__(self) -> None:
        self.host_bytes = 0  # there now
        self._last: weakref.ref[Layer] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def layer(self) -> "Layer":
        """A place for what the next layer keeps; its coming back announces that of the layer before it."""
        layer = Layer(self, self._last)
        self._last = weakref.ref(layer)
        return layer

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a device on which its tensors travel."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def hold(self, event: torch.cuda.Event, tensor: Tensor) -> None:
        """Keep a tensor that is leaving until it has left, without stopping the host."""
        self._leaving.append((event, tensor))
        while len(self._leaving) > MAX_LEAVING or (self._leaving and self._leaving[0][0].query()):
            left, _ = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(left)


class Layer:
    """What one layer keeps, on the host; hooks of saved tensors for `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, memory: HostMemory, before: "weakref.ref[Layer] | None") -> None:
        self.memory = memory
        self.before = before
        self.away: list[weakref.ref[Away]] = []

    def pack(self, tensor: Tensor) -> Any:
        """Activations leave; weights, counts and what is empty stay."""
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        away = Away(self, tensor.detach())
        self.away.append(weakref.ref(away))
        return away

    def unpack(self, packed: Any) -> Tensor:
        """What `pack` was given; the rest of this layer and the layer before it set out as well."""
        if not isinstance(packed, Away):
            return packed
        tensor = packed.take()
        self.come()
        before = self.before() if self.before is not None else None
        if before is not None:
            before.come()
        return tensor

    def come(self) -> None:
        """Bring back what is not here nor on its way."""
        for reference in self.away:
            if (away := reference()) is not None and not away.was_taken:
                away.start()


class Away:
    """A tensor on the host."""

    def __init__(self, layer: Layer, tensor: Tensor) -> None:
        self.layer, self.device = layer, tensor.device
        self.was_taken = False
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        if tensor.is_cuda:
            stream = layer.memory.stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self.host.copy_(tensor, non_blocking=True)
            layer.memory.hold(stream.record_event(), tensor)
        else:
            self.host = tensor.clone()
        layer.memory.host_bytes += self.host.nbytes
        weakref.finalize(self, _forget, layer.memory, self.host.nbytes)

    def start(self) -> None:
        """Set out for the device."""
        if self.device.type != "cuda" or self._arriving is not None:
            return
        stream = self.layer.memory.stream(self.device)
        with torch.cuda.stream(stream):
            tensor = torch.empty_like(self.host, device=self.device, pin_memory=False)
            tensor.copy_(self.host, non_blocking=True)
        self._arriving = (tensor, stream.record_event())

    def take(self) -> Tensor:
        """The tensor on its device; what the current stream does with it waits for its arrival."""
        self.was_taken = True
        self.start()
        if self._arriving is None:
            return self.host
        (tensor, arrived), self._arriving = self._arriving, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        tensor.record_stream(current)  # its memory came from the stream it travelled on
        return tensor


def _forget(memory: HostMemory, num_bytes: int) -> None:
    memory.host_bytes -= num_bytes
