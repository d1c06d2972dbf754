"""Cut a batch over the ranks that share its sequence, and join what they made of it; gradients find their owner."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tuner.errors import UserError
from tuner.parallel.mesh import Degrees
from tuner.parallel.ranks import Ranks
from tuner.parallel.zigzag import held_by, zigzag

PER_TOKEN = ("input_ids", "labels", "position_ids", "loss_weights")  # keys of a batch with a value per token


def held_tokens(cu_seqlens: torch.Tensor, degrees: Degrees, rank: int) -> torch.Tensor:
    """(T/n,) int64 on the CPU: which tokens of the pack the rank `rank` of n holds, in its order.

    Without a ring the rank-th n-th of the pack; with one the ring's zig-zag over the documents, and of that the part
    of the Ulysses rank. Documents stay in their order.
    """
    edges = cu_seqlens.tolist()
    size = degrees.size
    if edges[-1] % size:
        raise UserError(
            f"A pack of {edges[-1]} tokens does not split over {size} ranks. "
            f"Let collate pad it: pad_to_multiple_of={size} makes {edges[-1] + -edges[-1] % size}."
        )
    place, part = divmod(rank, degrees.ulysses)
    if degrees.ring == 1:
        held = torch.arange(edges[-1])
    else:
        held = held_by(zigzag(edges, degrees.ring), place).position
    return held.unflatten(0, (degrees.ulysses, -1))[part]


def cut(batch: Mapping[str, Any], degrees: Degrees, rank: int) -> dict[str, Any]:
    """The part of a batch that the rank `rank` of those sharing its sequence takes.

    Values per token are cut; `cu_seqlens`, `max_seqlen`, `num_loss_tokens` and whatever else stays as it is, of the
    whole pack. Labels were shifted before and positions counted, so a cut may fall anywhere.

    Raises:
        UserError: the tokens of the pack do not divide by the ranks.
    """
    if degrees.size == 1:
        return dict(batch)
    held = held_tokens(batch["cu_seqlens"], degrees, rank)
    return {name: value[:, held.to(value.device)] if _is_cut(name, value) else value for name, value in batch.items()}


def _is_cut(name: str, value: Any) -> bool:
    return name in PER_TOKEN and value is not None


def scatter(x: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all ranks have alike: (1, T, ...) -> (1, T/n, ...).

    The gradient is of this part alone, zero elsewhere: summed over the ranks, as gradients of parameters are, it is
    the whole.
    """
    return x.index_select(1, held.to(x.device))


def gather(x: torch.Tensor, ranks: Ranks, cu_seqlens: torch.Tensor, degrees: Degrees) -> torch.Tensor:
    """Join the parts of all ranks in the order of the pack: (1, T/n, ...) -> (1, T, ...).

    A rank's loss is its part of a sum, so the gradients that all ranks have for a token are summed and go back to the
    rank that holds it. Where every rank computes the same loss of the joined tensor, only one may count it.

    Args:
        ranks: `Mesh.sequence`.
        cu_seqlens: (documents + 1,) int32, of the whole pack.
    """
    held = [held_tokens(cu_seqlens, degrees, rank) for rank in range(degrees.size)]
    joined = x if ranks.size == 1 else _Gather.apply(x, ranks)
    return joined.index_select(1, torch.cat(held).argsort().to(x.device))


class _Gather(torch.autograd.Function):
    """(1, T/n, ...) -> (1, T, ...), the parts in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """All parts."""
        ctx.ranks = ranks
        return torch.cat(ranks.all_gather(x), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum of what all ranks have for the part of this one, in the order of the ranks."""
        parts = grad.unflatten(1, (ctx.ranks.size, -1)).movedim(1, 0)  # (n, 1, T/n, ...)
        exact = torch.promote_types(grad.dtype, torch.float32)
        return ctx.ranks.all_to_all(parts).sum(0, dtype=exact).to(grad.dtype), None
