"""Attention that is computed once where a layer is computed again: its output is kept, its inputs come again."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuner.parallel.ulysses import Attention

NUM_INPUTS = 3  # query, key, value
Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class KeptAttention:
    """What the attention of one layer leaves between the forward and the time when the layer is computed again."""

    def __init__(self, pack: Pack | None = None, unpack: Unpack | None = None) -> None:
        """`pack` and `unpack` put what is kept elsewhere, and bring it back."""
        self.pack: Pack = pack or _itself
        self.unpack: Unpack = unpack or _itself
        self.outputs: deque[Any] = deque()
        """packed, or a `_View` of what the attention's graph has packed already"""
        self.is_again = False

    @contextmanager
    def entered(self, *, again: bool) -> Iterator[None]:
        """Inside, the functions that `keep` made know of it: first to compute and keep, then to take what was kept."""
        before, self.is_again = getattr(_LOCAL, "kept", None), again
        _LOCAL.kept = self
        try:
            yield
        finally:
            _LOCAL.kept = before

    def keep_output(self, output: Tensor, packed: "_View | None") -> None:
        """For `take_output`, in the order of calls; `packed` where it is kept already."""
        self.outputs.append(packed or self.pack(output))

    def take_output(self) -> Tensor:
        """The first that was kept and not taken."""
        packed = self.outputs.popleft()
        return packed.tensor(self.unpack) if isinstance(packed, _View) else self.unpack(packed)


_LOCAL = threading.local()  # a layer of a GPU is computed again in that GPU's own thread


def keep(attention: Attention) -> Attention:
    """`attention`, which inside a `KeptAttention` computes its output once.

    Kept are its output and whatever else its backward wants beside its inputs (the log-sum-exp of the scores). Query,
    key and value are not: they come from the layer that is computed again, and anything that shares their memory too.
    Copies that an attention makes of them are kept.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, *edges: Any, **options: Any) -> Tensor:
        """As `packed_attention`: (1, H, T, D) -> (1, H, T, D)."""
        kept: KeptAttention | None = getattr(_LOCAL, "kept", None)
        if kept is None or not torch.is_grad_enabled():
            return attention(query, key, value, *edges, **options)
        if kept.is_again:
            return _Again.apply(kept, query, key, value)
        return _Once.apply(kept, lambda *inputs: attention(*inputs, *edges, **options), query, key, value)

    return attend


def kept_bytes(num_heads: int, head_size: int, itemsize: int = 2) -> int:
    """Bytes per token and layer of what stays: the output in the compute precision, and the log-sum-exp in fp32."""
    return num_heads * (head_size * itemsize + 4)


def _itself(kept: Any) -> Any:
    return kept


class _Inside:
    """The graph of one attention, whose saved inputs are left out and found again."""

    def __init__(self, kept: KeptAttention, attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        """Compute it, with a graph of its own."""
        self.kept = kept
        self.found: list[Tensor] = []  # the inputs, once they are computed again
        self.grads: list[Tensor | None] = []
        self.places = {tensor.untyped_storage().data_ptr(): place for place, tensor in enumerate(inputs)}
        self.layouts = [_layout(tensor) for tensor in inputs]
        self.start = torch.empty(0, requires_grad=True)
        self.packed: list[tuple[Tensor, _Twice]] = []  # what may be the output; held, so that no address is given anew
        self.num_elements = inputs[0].numel()
        # A leaf would be held by its graph: the inputs come in behind one that holds nothing.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            output = attend(*_Enter.apply(self.grads, self.start, *(tensor.detach() for tensor in inputs)))
        self.view = next((view for own, twice in self.packed if (view := _view(own, twice, output))), None)
        self.places, self.packed = {}, []  # addresses are given out anew
        self.output: Tensor | None = output.detach()  # for the forward, which takes it
        self.end = torch.autograd.graph.get_gradient_edge(output)

    def pack(self, tensor: Tensor) -> Any:
        """An input by its place, with how it was seen; anything else is kept."""
        place = self.places.get(tensor.untyped_storage().data_ptr())
        if place is None or tensor.dtype != self.layouts[place][0] or not tensor.numel():
            return self.pack_other(tensor)
        return _Part(place, tensor.size(), tensor.stride(), tensor.storage_offset())

    def pack_other(self, tensor: Tensor) -> Any:
        """What is no input; the output may be among it, which is wanted a second time."""
        packed = self.kept.pack(tensor)
        if packed is tensor or tensor.numel() != self.num_elements or not _is_dense(tensor):
            return packed
        twice = _Twice(packed)
        self.packed.append((tensor, twice))
        return twice

    def unpack(self, packed: Any) -> Tensor:
        """What `pack` was given."""
        if isinstance(packed, _Twice):
            return packed.take(self.kept.unpack)
        if not isinstance(packed, _Part):
            return self.kept.unpack(packed)
        tensor = self.found[packed.place]
        if _layout(tensor) != self.layouts[packed.place]:
            raise RuntimeError("A layer that was computed again laid out the inputs of its attention differently.")
        return tensor.as_strided(*packed[1:])

    def backward(self, grad: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of the inputs, which were computed again."""
        self.found[:] = inputs
        torch.autograd.grad(self.end, self.start, grad, allow_unused=True)
        self.found.clear()
        return self.grads


class _Part(NamedTuple):
    """Some of an input of the attention."""

    place: int  # of the input
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Twice:
    """What is kept once, and wanted by the attention's graph, and, as its output, by the layer before that."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.here: Tensor | None = None

    def look(self, unpack: Unpack) -> Tensor:
        """The tensor, which stays until it is taken."""
        if self.here is None:
            self.here = unpack(self.packed)
        return self.here

    def take(self, unpack: Unpack) -> Tensor:
        """The tensor, for the last time."""
        tensor, self.here = self.look(unpack), None
        return tensor


class _View(NamedTuple):
    """The output, in another shape than the graph has kept it in."""

    twice: _Twice
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self, unpack: Unpack) -> Tensor:
        """The output."""
        kept = self.twice.look(unpack)
        return kept.as_strided(self.size, self.stride, kept.storage_offset())


def _view(own: Tensor, twice: _Twice, output: Tensor) -> _View | None:
    """How to see `output` in what was kept of `own`, if both are the same memory."""
    is_same = own.data_ptr() == output.data_ptr() and own.dtype == output.dtype and own.numel() == output.numel()
    if not is_same or not _is_dense(output):
        return None
    return _View(twice, output.size(), output.stride())


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], int]:
    return tensor.dtype, tensor.stride(), tensor.storage_offset()


class _Enter(torch.autograd.Function):
    """Inputs into a graph that does not hold them; their gradients into a list."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor | None], start: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs."""
        ctx.grads = grads
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Out of the graph."""
        ctx.grads[:] = grads
        return (None,) * (2 + NUM_INPUTS)


class _Once(torch.autograd.Function):
    """The attention of the forward, and the only backward there is."""

    @staticmethod
    def forward(ctx: Any, kept: KeptAttention, attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D)."""
        ctx.save_for_backward(*inputs)
        ctx.inside = _Inside(kept, attend, inputs)
        output, ctx.inside.output = ctx.inside.output, None
        kept.keep_output(output, ctx.inside.view)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """By the graph of the forward."""
        inside, ctx.inside = ctx.inside, None
        return None, None, *inside.backward(grad, ctx.saved_tensors)


class _Again(torch.autograd.Function):
    """What was kept, in place of the attention; saves what `_Once` saves, so that the checkpoint finds it."""

    @staticmethod
    def forward(ctx: Any, kept: KeptAttention, *inputs: Tensor) -> Tensor:
        """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D)."""
        ctx.save_for_backward(*inputs)
        return kept.take_output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Never: what computes a layer again wants what it saves, not its graph."""
        raise RuntimeError("The graph of a layer that was computed again is not to be run.")
