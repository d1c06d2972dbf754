"""Weights that bitsandbytes stored in 4 bits, as the numbers that they stand for, a block at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.convert.tensors import Rows, StoredTensor, row_ranges
from tuner.errors import UserError

STATES = ("bitsandbytes__nf4", "bitsandbytes__fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"quant_state.{state}" for state in STATES))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FourBitTensor:
    """A tensor of 4-bit numbers: each is a place in a table of 16 values, times the scale of its block.

    The layout is bitsandbytes': two numbers in a byte, the first in its high half; scales (`absmax`) of blocks of
    `blocksize` numbers, which may be 8-bit numbers of a table themselves, times scales of their own, plus an offset.
    """

    name: str
    packed: StoredTensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    table: torch.Tensor
    """(16,) float32"""
    scales: torch.Tensor
    """(blocks,) float32"""
    blocksize: int

    def row_ranges(self) -> list[tuple[int, int]]:
        """Where blocks of rows begin and end."""
        return row_ranges(self.shape)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(last - first, ...) of its rows, in the dtype that they are computed with."""
        width = math.prod(self.shape[1:])
        begin, end = first * width, last * width
        data = self.packed.values(begin // 2, (end + 1) // 2).to(torch.int64)
        places = torch.stack((data >> 4, data & 15), dim=-1).flatten()[begin % 2 :][: end - begin]
        blocks = torch.arange(begin, end) // self.blocksize
        return (self.table[places] * self.scales[blocks]).to(self.dtype).view(last - first, *self.shape[1:])

    def blocks(self) -> Iterator[torch.Tensor]:
        """All of its values."""
        for first, last in self.row_ranges():
            yield self.rows(first, last)


def dequantised(tensors: Mapping[str, StoredTensor], directory: Path) -> dict[str, Rows]:
    """The tensors of a model directory, 4-bit ones as what they stand for and without their tables and scales.

    Raises:
        UserError: they are quantised in a way that is not known.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return dict(tensors)
    if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_4bit"):
        raise UserError(
            f"{directory} is quantised by {config.get('quant_method')!r}; what is read is bitsandbytes in 4 bits. Give "
            "the model that it was made from."
        )
    states = {
        name.removesuffix(f".quant_state.{state}"): tensor
        for name, tensor in tensors.items()
        for state in STATES
        if name.endswith(f".quant_state.{state}")
    }
    parts = {f"{name}.{part}" for name in states for part in PARTS}
    return {
        name: four_bit(tensor, states[name], tensors) if name in states else tensor
        for name, tensor in tensors.items()
        if name not in parts
    }


def four_bit(packed: StoredTensor, state: StoredTensor, tensors: Mapping[str, StoredTensor]) -> FourBitTensor:
    """A 4-bit tensor from its bytes, its state (JSON in a tensor of bytes) and its tables."""
    try:
        facts: dict[str, Any] = json.loads(bytes(state.whole().tolist()))
        scales = tensors[f"{packed.name}.absmax"].whole()
        if "nested_blocksize" in facts:
            own = tensors[f"{packed.name}.nested_absmax"].whole()
            blocks = torch.arange(len(scales)) // facts["nested_blocksize"]
            scales = tensors[f"{packed.name}.nested_quant_map"].whole()[scales.long()] * own[blocks]
            scales = scales + facts["nested_offset"]
        dtype, shape, blocksize = DTYPES[facts["dtype"]], tuple(facts["shape"]), facts["blocksize"]
        table = tensors[f"{packed.name}.quant_map"].whole().float()
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{packed.path} is no whole 4-bit model: {packed.name} lacks {error}. Copy it again."
        ) from error
    num_values = math.prod(shape)
    if packed.num_values != (num_values + 1) // 2 or len(scales) != math.ceil(num_values / blocksize):
        raise UserError(f"{packed.path} is damaged: {packed.name} has another size than its state says. Copy it again.")
    return FourBitTensor(packed.name, packed, dtype, shape, table, scales.float(), blocksize)
