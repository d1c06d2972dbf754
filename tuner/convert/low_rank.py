"""A weight of the base and its change of low rank, added in float32 a block of rows at a time."""

from collections.abc import Iterator

import torch

from tuner.convert.adapter_files import LowRank
from tuner.convert.tensors import Piece, Rows, StoredTensor, fit


def merged(base: Rows, change: LowRank, dtype: torch.dtype, name: str) -> Piece:
    """W + scale * left @ right, given its magnitude; computed in float32 whatever the dtypes are."""

    def blocks() -> Iterator[torch.Tensor]:
        for block in merged_blocks(base, change):
            yield fit(block, dtype, name)

    return Piece(name, dtype, base.shape, blocks)


def merged_blocks(base: Rows, change: LowRank) -> Iterator[torch.Tensor]:
    """float32 blocks of rows, one after the other."""
    magnitude = None if change.magnitude is None else change.magnitude.whole().float().flatten()
    if magnitude is not None and change.is_turned:
        squares = torch.zeros(base.shape[1])
        for block in sums(base, change):
            squares += block.square().sum(0)
        factors = magnitude / squares.sqrt()
    for (first, last), block in zip(base.row_ranges(), sums(base, change), strict=True):
        if magnitude is None:
            yield block
        elif change.is_turned:
            yield block.mul_(factors)
        else:
            yield block.mul_((magnitude[first:last] / torch.linalg.vector_norm(block, dim=1))[:, None])


def sums(base: Rows, change: LowRank) -> Iterator[torch.Tensor]:
    """float32 blocks of W + scale * left @ right."""
    left, right = change.factors()
    for first, last in base.row_ranges():
        block = base.rows(first, last).to(torch.float32)
        yield block.addmm_(left[first:last], right, alpha=change.scale)


def added(base: Rows, scale: float, change: StoredTensor, dtype: torch.dtype) -> Piece:
    """A bias and its change."""

    def blocks() -> Iterator[torch.Tensor]:
        yield fit(base.rows(0, base.shape[0]).float() + scale * change.whole().float(), dtype, base.name)

    return Piece(base.name, dtype, base.shape, blocks)
