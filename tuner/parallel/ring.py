"""Ring attention: keys and values go round over the ranks, and what each query sees of them is merged exactly."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuner.errors import UserError
from tuner.parallel.block_attention import Inputs, Outcome, attend_block, attend_block_backward
from tuner.parallel.ranks import Ranks, Transfer
from tuner.parallel.ulysses import Attention
from tuner.parallel.zigzag import Block, blocks_of

# Shapes: n ranks, T tokens of the whole sequence, H query heads, K kv heads, D head size


def ring(attention: Attention, ranks: Ranks) -> Attention:
    """Attention over sequences of which each rank holds the tokens that `zigzag.held_by` says.

    The result takes and gives (1, H, T/n, D), keys and values (1, K, T/n, D); any n, any number of heads. One rank
    alone keeps `attention`; more have kernels of their own, since blocks are merged by their log-sum-exp.

    Raises:
        UserError: when called, where the tensors are not T/n tokens of the pack that `cu_seqlens` describes.
    """
    return attention if ranks.size == 1 else RingAttention(ranks)


class RingAttention:
    """Ring attention over `ranks`; remembers the blocks of the pack it saw last, which all layers share."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._seen: tuple[Tensor, int] | None = None  # the tensor itself: its address is not given out anew
        self._blocks: list[Block] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        backend: str,
    ) -> Tensor:
        """(1, H, T/n, D) -> (1, H, T/n, D); `backend` chooses nothing here."""
        blocks = self._blocks_of(cu_seqlens, query)
        if window is not None and window >= max_seqlen:
            window = None
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return _Ring.apply(query, key, value, blocks, self.ranks, scale, window)

    def _blocks_of(self, cu_seqlens: Tensor, query: Tensor) -> list[Block]:
        """Worked out once per batch, since on a GPU reading the edges waits for all that is queued."""
        version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
        if self._seen is None or self._seen[0] is not cu_seqlens or self._seen[1] != version:
            edges = cu_seqlens.tolist()
            if query.shape[2] * self.ranks.size != edges[-1]:
                raise UserError(
                    f"A ring of {self.ranks.size} ranks got {query.shape[2]} tokens here of a pack of {edges[-1]}. "
                    "Each rank takes its part of the same pack: cut the batch by tuner.parallel.sequence.cut."
                )
            blocks = blocks_of(edges, self.ranks.size, self.ranks.rank)
            self._blocks = [block.to(query.device) for block in blocks]
            self._seen = (cu_seqlens, version)
        return self._blocks


class _Ring(torch.autograd.Function):
    """Forward and backward each let keys and values go round once; gradients of them go round after them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: list[Block],
        ranks: Ranks,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """(1, H, T/n, D), (1, K, T/n, D) twice -> (1, H, T/n, D)."""
        first, *later = blocks
        with torch.autocast(query.device.type, enabled=False):
            arriving = _arriving(torch.stack([key, value]), blocks, ranks)
            # every token sees itself in the first block, so that there is something to merge with
            output, lse = attend_block(_inputs(query, next(arriving), first, scale, window), first)
            output = output.to(lse.dtype)
            for block, held in zip(later, arriving):
                if len(block.query_rows):
                    _merge(output, lse, attend_block(_inputs(query, held, block, scale, window), block), block)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.fixed = (blocks, ranks, scale, window)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A rank's keys end their way where they began, with the gradients that all ranks have added."""
        query, key, value, output, lse = ctx.saved_tensors
        blocks, ranks, scale, window = ctx.fixed
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        grads_own: Tensor | None = None
        collected: Transfer | None = None  # for the keys that are here, of the ranks that had them before
        for block, held in zip(blocks, _arriving(torch.stack([key, value]), blocks, ranks)):
            grads = torch.zeros_like(held, dtype=lse.dtype)
            if len(block.query_rows):
                inputs = _inputs(query, held, block, scale, window)
                _add_gradients(grad_query, grads, (grad, output, lse), inputs, block)
            if grads_own is None:
                grads_own = grads
                continue
            if collected is not None:
                grads += collected.wait()
            collected = ranks.pass_on(grads)
        assert grads_own is not None
        assert collected is not None
        grad_key, grad_value = grads_own + collected.wait()
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _arriving(held: Tensor, blocks: list[Block], ranks: Ranks) -> Iterator[Tensor]:
    """Keys and values of the rank that each block is about; the next are on their way while these are used."""
    for _ in blocks[1:]:
        transfer = ranks.pass_on(held)
        yield held
        held = transfer.wait()
    yield held


def _inputs(query: Tensor, held: Tensor, block: Block, scale: float, window: int | None) -> Inputs:
    """The rows of a block; `held` (2, 1, K, T/n, D) are keys and values of the rank it is about."""
    key, value = held.index_select(3, block.key_rows)
    return Inputs(query.index_select(2, block.query_rows), key, value, scale, window)


def _merge(output: Tensor, lse: Tensor, part: Outcome, block: Block) -> None:
    """Take what some queries saw in a block into what they saw before, in place."""
    rows = block.query_rows
    before = lse.index_select(2, rows)
    after = torch.logaddexp(before, part.lse)
    kept = output.index_select(2, rows) * (before - after).exp()[..., None]
    output.index_copy_(2, rows, kept + part.output * (part.lse - after).exp()[..., None])
    lse.index_copy_(2, rows, after)


def _add_gradients(
    grad_query: Tensor,
    grad_held: Tensor,
    total: tuple[Tensor, Tensor, Tensor],
    inputs: Inputs,
    block: Block,
) -> None:
    """Add a block's share, in place; `total` is gradient, output and log-sum-exp of all queries here."""
    grad, output, lse = (tensor.index_select(2, block.query_rows) for tensor in total)
    query, key, value = attend_block_backward(grad, inputs, Outcome(output, lse), block)
    grad_query.index_add_(2, block.query_rows, query.to(grad_query.dtype))
    grad_held.index_add_(3, block.key_rows, torch.stack([key, value]).to(grad_held.dtype))
