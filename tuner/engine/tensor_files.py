"""Whole tensors by name, spread over one safetensors file per rank: any other number of ranks can read them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from tuner.engine.host_copies import HostCopies
from tuner.engine.world import World
from tuner.errors import UserError

WEIGHTS = "model"
OPTIMIZER = "optimizer"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
"""as safetensors names them"""
PIECE = 1 << 22  # bytes that are looked at, hashed and written while they are in the processor's cache


class NonFiniteTensorError(ArithmeticError):
    """A tensor to be saved has a NaN or an infinity."""


def file_name(kind: str, world: World) -> str:
    """The file of this rank: `model-00000-of-00002.safetensors`."""
    return f"{kind}-{world.rank:05d}-of-{world.size:05d}.safetensors"


def share_of(
    kind: str, tensors: Iterable[tuple[str, torch.Tensor]], world: World, copies: HostCopies | None = None
) -> dict[str, torch.Tensor]:
    """Every n-th tensor, in this host's memory; all ranks must give the same names in the same order.

    `tensors` may gather each tensor from all ranks as it is asked for: no more than one is whole at a time. Without
    `copies` a tensor that is in this memory already stays the same one, so training may not go on before it is written.
    """
    share = {}
    for place, (name, tensor) in enumerate(tensors):
        if place % world.size != world.rank:
            continue
        if copies is None:
            share[name] = tensor.detach().to("cpu").contiguous()
        else:
            share[name] = copies.take(f"{kind} {name}", tensor.detach())
    return share


def tensor_pieces(kind: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of tensors in this host's memory, piece by piece, for whoever writes and hashes them.

    Format: https://github.com/huggingface/safetensors#format; the widest dtypes first, so that all lie aligned.

    Raises:
        NonFiniteTensorError: a value is NaN or infinite; what has been given until then is no whole file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        start, end = end, end + tensors[name].nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in order:
        flat = tensors[name].contiguous().reshape(-1)
        for part in flat.split(PIECE // flat.element_size()):
            if not is_finite(part):
                raise NonFiniteTensorError(f"{kind} tensor {name}")
            yield memoryview(part.view(torch.uint8).numpy())


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; by the extremes, to which NaN spreads: a tenth of the time of `isfinite`."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    wide = values.float() if values.dtype.itemsize == 1 else values  # of 8 bits torch knows no extremes
    low, high = torch.aminmax(wide)
    return math.isfinite(low) and math.isfinite(high)


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one kind in a checkpoint, read one by one when they are asked for.

    Raises:
        UserError: there is no file of this kind, or the files are not those of one checkpoint.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        paths = sorted(directory.glob(f"{kind}-*-of-*.safetensors"))
        expected = [file_name(kind, World(rank, len(paths))) for rank in range(len(paths))]
        if not paths or [path.name for path in paths] != expected:
            raise UserError(f"{directory} is no whole checkpoint: of {kind}-*.safetensors it has {len(paths)} files.")
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._places = {name: place for place, file in enumerate(self._files) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[self._places[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._files[self._places[name]].get_slice(name).get_shape())

    def part(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor; only that is read."""
        return self._files[self._places[name]].get_slice(name)[index]
