"""Tensors of which each rank holds some rows: made whole one at a time to be saved, read from files row by row."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tuner.engine.tensor_files import TensorFiles


def whole(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with the rows of all ranks, gathered when it is asked for; all ranks must ask for all of them."""
    for name, tensor in tensors:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: DTensor) -> slice:
    """The rows of `tensor` that this rank holds: as `torch.chunk` deals them out, the last ranks may have none."""
    mesh, num_rows = tensor.device_mesh, tensor.shape[0]
    size = -(-num_rows // mesh.size(-1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * size, num_rows)
    rows = slice(start, min(start + size, num_rows))
    assert rows.stop - rows.start == tensor.to_local().shape[0], (rows, tensor.placements)
    return rows


class OwnParts(Mapping[str, Tensor]):
    """What this rank holds of the tensors in a checkpoint: parameters, or `<parameter name>.<state name>`.

    Of a tensor shaped like its parameter only those rows are read that the rank has of the parameter.

    Args:
        files: a checkpoint's tensors, whole.
        parameters: those of the model by name; plain tensors, or DTensors cut by rows over the last dimension of their
            mesh.
    """

    def __init__(self, files: TensorFiles, parameters: Mapping[str, Tensor]) -> None:
        self._files, self._parameters = files, parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters.get(name, self._parameters.get(name.rpartition(".")[0]))
        if not isinstance(parameter, DTensor) or self._files.shape(name) != tuple(parameter.shape):
            return self._files[name]
        return read_rows(self._files, name, parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_rows(files: TensorFiles, name: str, like: DTensor) -> DTensor:
    """A tensor on the device and in the layout of `like`."""
    rows = own_rows(like)
    if rows.start < rows.stop:
        own = files.part(name, (rows,))
    else:
        own = torch.empty_like(like.to_local())
    return DTensor.from_local(
        own.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
