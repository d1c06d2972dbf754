"""Ulysses: ranks change parts of the sequence for parts of the heads around an attention, and back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tuner.errors import UserError
from tuner.parallel.mesh import check_heads
from tuner.parallel.ranks import Ranks

# Shapes: n ranks, T tokens of the whole sequence, H query heads, K kv heads, D head size


# `packed_attention`, and what wraps it: (query, key, value, cu_seqlens, max_seqlen, *, scale, window, backend), where
# cu_seqlens and max_seqlen are of the whole sequence; (1, H, T, D) and (1, K, T, D) twice -> (1, H, T, D)
Attention = Callable[..., torch.Tensor]
Move = Callable[[Sequence[torch.Tensor], Ranks], tuple[torch.Tensor, ...]]


def ulysses(attention: Attention, ranks: Ranks) -> Attention:
    """`attention` over sequences of which each rank holds T/n tokens in their order; it sees all, for H/n heads.

    The result takes and gives (1, H, T/n, D), keys and values (1, K, T/n, D). Heads of keys and values travel as they
    are where n divides them; where they are fewer than the ranks, each goes to the n/K ranks that need it. A pass of
    a layer sends `num_elements` per rank, the part that stays at home included.

    Raises:
        UserError: when called, where n ranks cannot share the heads, with the numbers that could.
    """
    if ranks.size == 1:
        return attention

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *edges: Any, **options: Any
    ) -> torch.Tensor:
        """(1, H, T/n, D) -> (1, H, T/n, D)."""
        check_shapes(query, key, ranks)
        copies = max(1, ranks.size // key.shape[1])
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
        query, key, value = _Exchange.apply(ranks, to_heads, to_tokens, query, key, value)  # (1, H/n, T, D)
        output = attention(query, key, value, *edges, **options)
        return _Exchange.apply(ranks, to_tokens, to_heads, output)[0]

    return attend


def num_elements(num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, num_ranks: int) -> int:
    """What a rank gives into the exchanges of one layer and pass: 4 T hidden / n where every head has its own keys.

    Of these 1/n stay at home. Backward moves as many as forward.
    """
    heads = 2 * num_heads + 2 * max(num_kv_heads, num_ranks)  # query and output, key and value
    return heads * head_size * num_tokens // num_ranks


def check_shapes(query: torch.Tensor, key: torch.Tensor, ranks: Ranks) -> None:
    """UserError unless `ranks` can share one row of heads."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UserError(
            f"Sequence parallelism takes one row and no KV cache, got queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)}. Pack the documents end to end in one row and pass use_cache=False."
        )
    check_heads(query.shape[1], key.shape[1], ranks.size)


class _Exchange(torch.autograd.Function):
    """Tensors through `there`, in one exchange; their gradients through `back`, its inverse, in another."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, there: Move, back: Move, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`to_heads` or `to_tokens` of the parts."""
        ctx.ranks, ctx.back = ranks, back
        return there(parts, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The other of the two."""
        return None, None, None, *ctx.back(grads, ctx.ranks)


def to_heads(parts: Sequence[torch.Tensor], ranks: Ranks) -> tuple[torch.Tensor, ...]:
    """Rank i gets the i-th n-th of each tensor's heads, for all tokens: (1, h, T/n, D) -> (1, h/n, T, D)."""
    for_rank = [part[0].unflatten(0, (ranks.size, -1)).transpose(1, 2) for part in parts]  # (n, T/n, h/n, D)
    received = ranks.all_to_all(torch.cat(for_rank, dim=2)).flatten(0, 1)  # (T, sum of h/n, D)
    sizes = [part.shape[2] for part in for_rank]
    return tuple(part.transpose(0, 1)[None] for part in received.split(sizes, dim=1))


def to_tokens(parts: Sequence[torch.Tensor], ranks: Ranks) -> tuple[torch.Tensor, ...]:
    """The inverse of `to_heads`: rank i gets the i-th n-th of the tokens, (1, h/n, T, D) -> (1, h, T/n, D)."""
    for_rank = [part[0].transpose(0, 1).unflatten(0, (ranks.size, -1)) for part in parts]  # (n, T/n, h/n, D)
    received = ranks.all_to_all(torch.cat(for_rank, dim=2))  # rank i sent its heads of the tokens here
    sizes = [part.shape[2] for part in for_rank]
    # (T/n, h, D) in memory, which is what a model flattens next
    return tuple(part.transpose(0, 1).flatten(1, 2).transpose(0, 1)[None] for part in received.split(sizes, dim=2))
