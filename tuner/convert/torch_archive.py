"""Files as torch.save writes them, of tensors that come a block at a time: memory does not grow with them."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from tuner.convert.pickled import LOCAL_HEADER, STORAGES, contiguous
from tuner.convert.tensors import Piece

ALIGNMENT = 64  # bytes, to which torch.save aligns storages, so that they can be mapped
PADDING = b"FB"  # the zip extra field that it pads with
ZIP64_FIELD = 20  # bytes of the extra field for sizes of over 32 bits
VERSION = b"3\n"  # of the archive format, torch.serialization
STORAGE_CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items() if hasattr(torch, name)}


@dataclass(frozen=True)
class StorageStandIn:
    """In the place of a tensor's numbers, which lie in a record of their own."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorStandIn:
    """Pickled as a tensor is."""

    storage: StorageStandIn
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """What torch.Tensor gives: storage, offset, sizes, strides, requires_grad, hooks."""
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, contiguous(self.shape), False, OrderedDict())


class TensorPickler(pickle.Pickler):
    """Writes persistent ids as torch.save does."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Of a storage: its class, its record, its device and its number of values."""
        if not isinstance(value, StorageStandIn):
            return None
        return "storage", STORAGE_CLASSES[value.dtype], value.key, "cpu", value.count


def write_archive(path: Path, tensors: Mapping[str, Piece]) -> None:
    """A dict of tensors by name as a file that torch.load reads, weights_only or not.

    Args:
        path: is written.
        tensors: by their keys in the dict; their blocks are asked for once, one after the other.

    Raises:
        OSError: the disk refused.
    """
    content, pickled = {}, io.BytesIO()
    for place, (name, piece) in enumerate(tensors.items()):
        count = piece.num_bytes // piece.dtype.itemsize
        content[name] = TensorStandIn(StorageStandIn(str(place), piece.dtype, count), piece.shape)
    TensorPickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        archive.writestr(record(archive, f"{path.stem}/data.pkl", 0), pickled.getvalue())
        archive.writestr(record(archive, f"{path.stem}/byteorder", 0), b"little")
        for place, piece in enumerate(tensors.values()):
            entry = record(archive, f"{path.stem}/data/{place}", piece.num_bytes)
            with archive.open(entry, "w") as file:
                file.writelines(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())
                                for block in piece.blocks())  # fmt: skip
            assert entry.file_size == piece.num_bytes, (piece.name, entry.file_size)
        archive.writestr(record(archive, f"{path.stem}/version", 0), VERSION)


def record(archive: zipfile.ZipFile, name: str, num_bytes: int) -> zipfile.ZipInfo:
    """The entry that comes next, padded so that its bytes are aligned; the same for the same content, whenever."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = num_bytes
    is_large = num_bytes * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides it
    place = archive.start_dir + LOCAL_HEADER + len(name.encode()) + len(PADDING) + 2 + ZIP64_FIELD * is_large
    padding = -place % ALIGNMENT
    entry.extra = PADDING + padding.to_bytes(2, "little") + b"Z" * padding
    return entry
