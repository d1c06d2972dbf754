"""Attention without arithmetic: it allocates what the kernels allocate, and exchanges with ranks that are not there."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tuner.model.attention import attention_of
from tuner.model.attention_cuda import heads_last
from tuner.model.attention_sdpa import Pack, sdpa_attention
from tuner.parallel.mesh import Degrees
from tuner.parallel.ranks import Ranks, Transfer
from tuner.parallel.ulysses import ulysses

NAME = "tuner_planned"
FLASH_PADDING = 128  # tokens that FlashAttention-2's backward allocates more of its fp32 sum, for each document


class Edges:
    """In place of `cu_seqlens`: one document, whose edges can be read where tensors have no values."""

    device = torch.device("meta")

    def __init__(self, num_tokens: int) -> None:
        self.edges = [0, num_tokens]

    def tolist(self) -> list[int]:
        """[0, tokens]."""
        return self.edges

    def __len__(self) -> int:
        return len(self.edges)


class Absent(Ranks):
    """Ranks that share something with this one and do not run: what would come from them is memory alone."""

    def __init__(self, size: int) -> None:
        super().__init__([0], 0)
        self.members = tuple(range(size))

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """(n, ...) -> (n, ...)."""
        return torch.empty_like(tensor.contiguous())

    def pass_on(self, tensor: Tensor) -> Transfer:
        """Any shape, and the same."""
        tensor = tensor.contiguous()
        return Transfer(torch.empty_like(tensor), [], tensor)


def register(degrees: Degrees, kernel: str) -> str:
    """Bind the attention that stands in for the one of training; the name by which transformers finds it.

    Args:
        degrees: over how many ranks a sequence is cut.
        kernel: "flash" allocates as FlashAttention-2 does on a GPU, "sdpa" is torch's on the CPU.
    """
    around_ring = ring_attention if degrees.ring > 1 else {"flash": flash_attention, "sdpa": cpu_attention}[kernel]
    attention = ulysses(around_ring, Absent(degrees.ulysses)) if degrees.ulysses > 1 else around_ring
    AttentionInterface.register(NAME, attention_of("sdpa", attention))
    AttentionMaskInterface.register(NAME, lambda **_: None)
    return NAME


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, edges: Any, longest: int, **options: Any) -> Tensor:
    """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D)."""
    return sdpa_attention(Pack(query, key, value, edges, longest, options["scale"], options["window"]))


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D)."""
    return _Flash.apply(*(heads_last(tensor) for tensor in (query, key, value))).transpose(0, 1)[None]


def ring_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D), as `tuner.parallel.ring` allocates."""
    return _Ring.apply(query, key, value)


class _Flash(torch.autograd.Function):
    """Outputs, log-sum-exp and gradients; for the backward an fp32 sum, and keys and values for each query head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, H, D), (T, K, D) twice -> (T, H, D)."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, _lse(query))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Three gradients."""
        query, key, value, _, lse = ctx.saved_tensors
        grad = grad.contiguous()
        total = query.new_empty((query.shape[0] + FLASH_PADDING, *query.shape[1:]), dtype=torch.float32)
        delta = torch.empty_like(lse)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        expanded = [torch.empty_like(query) for _ in range(2)] if key.shape[1] != query.shape[1] else []
        del total, delta, expanded
        return grads


class _Ring(torch.autograd.Function):
    """Keys and values come round in pairs; outputs and gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, H, T, D), (1, K, T, D) twice -> (1, H, T, D)."""
        held = torch.stack([key, value])
        arriving = torch.empty_like(held)
        output, lse = torch.empty_like(query, dtype=torch.float32), _lse(query[0].transpose(0, 1))
        part = torch.empty_like(output)
        del arriving, part
        rounded = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, rounded, lse)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Three gradients."""
        query, key, value, _, _ = ctx.saved_tensors
        held = torch.stack([key, value])
        total = torch.empty_like(query, dtype=torch.float32)
        moving = [torch.empty_like(held), *(torch.empty_like(held, dtype=torch.float32) for _ in range(3))]
        of_block = torch.empty_like(query), torch.empty_like(held)
        del of_block, moving
        return total.to(query.dtype), torch.empty_like(key), torch.empty_like(value)


def _lse(query: Tensor) -> Tensor:
    """(T, H, D) -> (H, T) fp32."""
    return query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
