"""The bytes of all tensors that are alive, counted as they are made and let go; fake tensors count as real ones."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operation makes counts until the last tensor on it is gone.

    What a kernel needs for itself while it runs is not seen. Tensors of before count once something returns them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0  # bytes alive
        self.peak = 0  # the most since the start, or since `restart`
        self._known: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Sequence[torch.Tensor]) -> None:
        """Never count these; who calls keeps them alive."""
        self._ignored.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def restart(self) -> int:
        """The peak so far; a new one begins from what is alive."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation, and a look at what it returns."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._ignored:
            return
        self._known[key] = storage.nbytes()
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key)
