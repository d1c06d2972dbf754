"""Copies of tensors in this host's memory, in buffers that stay from one save to the next."""

import torch
from torch import Tensor


class HostCopies:
    """Training may go on as soon as the copies are made; whoever writes them must be done before the next are taken.

    New memory costs several times as long as a copy does, so buffers are used again; those for GPUs are pinned.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """`tensor` in the buffer `key`, contiguous; from a GPU only after `wait`."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    def wait(self) -> None:
        """Until all copies are there."""
        for device in self._devices:
            torch.cuda.synchronize(device)
