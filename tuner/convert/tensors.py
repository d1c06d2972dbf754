"""Tensors on their way from file to file, a block at a time: memory does not grow with their size."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from tuner.errors import UserError

BLOCK_SIZE = 1 << 20  # values, so that a block is still in the processor's cache when it is written
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""what a safetensors header calls each dtype"""
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor that is to be written: what a header says of it, and its values, made when they are asked for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]
    """tensors of `dtype` that hold the values in the order of memory, row after row; their own shapes do not matter"""

    @property
    def num_bytes(self) -> int:
        """Of the tensor in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Rows(Protocol):
    """A tensor that is read a block of rows at a time, wherever its values come from."""

    @property
    def name(self) -> str:
        """Of the tensor in its model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(last - first, ...) of its rows."""

    def row_ranges(self) -> list[tuple[int, int]]:
        """Where blocks of rows begin and end."""

    def blocks(self) -> Iterator[torch.Tensor]:
        """All of its values, in the order of memory."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read by plain reads: a memory map would count every byte as this process's."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """first byte of the tensor in its file"""

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def values(self, first: int, last: int) -> torch.Tensor:
        """(last - first,) of its values, in the order of memory."""
        values = torch.empty(last - first, dtype=self.dtype)
        if values.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.begin + first * self.dtype.itemsize)
                read_fully(file, memoryview(values.view(torch.uint8).numpy()), self.path)
        return values

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(last - first, ...) of its rows."""
        width = math.prod(self.shape[1:])
        return self.values(first * width, last * width).view(last - first, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        """The tensor in memory."""
        return self.values(0, self.num_values).view(self.shape)

    def row_ranges(self) -> list[tuple[int, int]]:
        """Where blocks of rows begin and end."""
        return row_ranges(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """All of its values, BLOCK_SIZE at a time."""
        for first in range(0, self.num_values, BLOCK_SIZE):
            yield self.values(first, min(first + BLOCK_SIZE, self.num_values))


def row_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where blocks of about BLOCK_SIZE values begin and end, in rows."""
    step = max(1, BLOCK_SIZE // max(1, math.prod(shape[1:])))
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def read_fully(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Fill the buffer; a file that ends before is damaged."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # at most 2 GB come at once
        if not count:
            raise UserError(f"{path} is damaged: it ends too early. Copy it again.")
        done += count


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order in which they lie there; none of them is read.

    Raises:
        UserError: it is no whole safetensors file, or has a dtype that torch does not know.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # it checks that the tensors fill the file, without a hole or an overlap
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}. Copy it again.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise UserError(f"{path} has tensors of type {', '.join(unknown)}; known are {', '.join(DTYPES)}.")
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {}
    for name, entry in entries:
        begin = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    return tensors


def cast(tensor: Rows, dtype: torch.dtype | None = None, name: str | None = None) -> Piece:
    """The tensor as it is, or in another dtype; integers stay what they are.

    Raises:
        UserError: while its blocks are made, where a finite value would become infinite.
    """
    target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    def blocks() -> Iterator[torch.Tensor]:
        for block in tensor.blocks():
            yield block if target == tensor.dtype else fit(block, target, tensor.name)

    return Piece(name or tensor.name, target, tensor.shape, blocks)


def fit(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The block in another floating dtype; UserError where a finite value is beyond its range."""
    result = block.to(dtype)
    if not is_finite(result) and is_finite(block):
        raise UserError(
            f"{name} has values up to {block.abs().max():.3g}, {dtype} ends at {torch.finfo(dtype).max:.3g}. "
            "Nothing was written. Choose --dtype bf16 or fp32."
        )
    return result


def is_finite(block: torch.Tensor) -> bool:
    """Whether all values are; by the extremes, which are NaN where a value is, in a tenth of isfinite's time."""
    return not block.numel() or all(map(math.isfinite, (extreme.item() for extreme in block.aminmax())))


def total_bytes(pieces: Sequence[Piece]) -> int:
    """Of all tensors, without headers."""
    return sum(piece.num_bytes for piece in pieces)
