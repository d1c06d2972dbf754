"""Whole tensors by name, spread over one safetensors file per rank: any other number of ranks can read them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tuner.engine.world import World
from tuner.errors import UserError

WEIGHTS = "model"
OPTIMIZER = "optimizer"


def file_name(kind: str, world: World) -> str:
    """The file of this rank: `model-00000-of-00002.safetensors`."""
    return f"{kind}-{world.rank:05d}-of-{world.size:05d}.safetensors"


def share_of(tensors: Iterable[tuple[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
    """Every n-th tensor, copied to this host's memory; all ranks must give the same names in the same order.

    `tensors` may gather each tensor from all ranks as it is asked for: no more than one is whole at a time.
    """
    share = {}
    for place, (name, tensor) in enumerate(tensors):
        if place % world.size == world.rank:
            share[name] = tensor.detach().to("cpu", copy=world.size > 1).contiguous()
    return share


def write_share(directory: Path, kind: str, share: Mapping[str, torch.Tensor], world: World) -> None:
    """This rank's file; OSError or SafetensorError where the disk refuses."""
    save_file(dict(share), directory / file_name(kind, world), metadata={"format": "pt"})


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
