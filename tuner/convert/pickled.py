"""Old weight files that are pickles, read by an unpickler that can build nothing but descriptions of tensors.

No function or class that a file names is ever imported or called: each allowed name stands for one of this module's,
and any other is refused. Tensors are not read either; where they lie in the file is.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from tuner.convert.pickle_scan import MAX_BYTES, check_pickle
from tuner.convert.tensors import StoredTensor
from tuner.errors import UserError

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
KINDS = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()} | {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
STRANGERS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.{name}" for name in ("ndarray", "dtype")),
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    *(f"deepspeed.utils.tensor_fragment.{name}" for name in ("fragment_address", "tensor_fragment")),
    "argparse.Namespace",
    "datetime.datetime",
)
"""classes that honest checkpoints hold beside their weights; what is made of them here is an empty object"""
MAX_DIMENSIONS = 8
LOCAL_HEADER = 30  # bytes of a zip file's header before a record's name
CHECKED_AT_A_TIME = 16 << 20  # bytes
OTHERWISE = "If it is older, load it with the program that wrote it and save it again."
PICKLE_ERRORS = (pickle.UnpicklingError, TypeError, ValueError, KeyError, IndexError, AttributeError, EOFError)


class Fixed:
    """A value that a pickle must not change: the instruction BUILD would write into its attributes."""

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("it changes what is no object of its own")


class Inert:
    """What is made of an object that is no weight: nothing. It takes what a pickle puts in, and keeps none."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> "Inert":
        """Any arguments, as the real class would have them."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Dropped."""

    def __setitem__(self, key: object, value: object) -> None:
        """Dropped."""

    def append(self, value: object) -> None:
        """Dropped."""

    def extend(self, values: object) -> None:
        """Dropped."""


class Ordered(dict):
    """In the place of OrderedDict, whose attributes a pickle may set."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Dropped: `_metadata` of a state_dict, for one."""


class Kind(Fixed):
    """The name of a dtype, or of a storage with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Call(Fixed):
    """One of the functions below, in the place of that which the pickle names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives."""
        return self._function(*arguments)


class Region(NamedTuple):
    """Bytes of a file."""

    path: Path
    begin: int
    num_bytes: int
    crc: int


class Storage(Fixed):
    """Numbers of one dtype that tensors are cut from."""

    def __init__(self, region: Region, dtype: torch.dtype) -> None:
        self.region, self.dtype = region, dtype


@dataclass(frozen=True)
class PickledTensor(Fixed, StoredTensor):
    """A tensor in a pickle's file; its rows may lie apart from each other, as those of a transposed one do."""

    strides: tuple[int, ...]
    region: Region

    def values(self, first: int, last: int) -> torch.Tensor:
        """(last - first,) of its values, row after row."""
        if contiguous(self.shape) == self.strides or self.num_values < 2:
            return super().values(first, last)
        span = 1 + sum((count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True))
        return super().values(0, span).as_strided(self.shape, self.strides).reshape(-1)[first:last]

    def named(self, name: str) -> "PickledTensor":
        """The same tensor under a name."""
        return replace(self, name=name)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies row after row."""
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def integers(values: object) -> tuple[int, ...]:
    """A tuple of counts; raises UnpicklingError for anything else."""
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor's shape is no tuple of numbers")
    if any(type(value) is not int or value < 0 for value in values):
        raise pickle.UnpicklingError("a tensor's shape is no tuple of numbers")
    return tuple(values)


def tensor_of(storage: object, offset: object, size: object, stride: object, dtype: torch.dtype) -> PickledTensor:
    """The description of a tensor; all of it must lie in its storage, and no number of it twice."""
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor is made of no storage")
    shape, strides, (begin,) = integers(size), integers(stride), integers((offset,))
    if len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor has other numbers of sizes and strides")
    room = storage.region.num_bytes // dtype.itemsize
    last = begin + sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= room or math.prod(shape) > room):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} lies outside of its storage")
    place = storage.region.begin + begin * dtype.itemsize
    return PickledTensor(storage.region.path, "", dtype, shape, place, strides=strides, region=storage.region)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> PickledTensor:
    """In the place of torch's function of that name."""
    return tensor_of(storage, offset, size, stride, getattr(storage, "dtype", torch.uint8))


def rebuild_tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: object
) -> PickledTensor:
    """In the place of torch's function for dtypes that have no storage class."""
    if not isinstance(dtype, Kind):
        raise pickle.UnpicklingError("a tensor's dtype is none")
    return tensor_of(storage, offset, size, stride, dtype.dtype)


def rebuild_typed(function: object, kind: object, arguments: object, state: object) -> PickledTensor:
    """In the place of torch's function for tensors with attributes, such as DeepSpeed's; they are dropped."""
    if not isinstance(function, Call) or kind is not TENSOR or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("it makes a tensor as torch.save does not")
    result = function(*arguments)
    if not isinstance(result, PickledTensor):
        raise pickle.UnpicklingError("it makes a tensor of what is none")
    return result


def whole_number(value: object) -> int:
    """In the place of an enumeration of numbers."""
    return integers((value,))[0]


def attribute(owner: object, name: object) -> Inert:
    """In the place of getattr, by which mmengine's logs name their functions: it gives nothing, whatever is asked."""
    if owner is not Inert:
        raise pickle.UnpicklingError("it asks for an attribute with getattr")
    return Inert()


TENSOR = Fixed()
"""the class itself, which may be named beside a tensor with attributes, and nowhere else"""
NAMES: dict[str, Any] = {
    "torch.Tensor": TENSOR,
    "torch.nn.parameter.Parameter": TENSOR,
    "torch._tensor._rebuild_from_type_v2": Call(rebuild_typed),
    "collections.OrderedDict": Ordered,
    "torch.Size": Call(integers),
    "torch.device": Inert,
    "torch._utils._rebuild_tensor_v2": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Call(rebuild_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Call(lambda tensor, *_: tensor),
    "_codecs.encode": Inert,
    "__builtin__.set": Inert,
    "__builtin__.getattr": Call(attribute),
    "deepspeed.runtime.zero.config.ZeroStageEnum": Call(whole_number),
    **{f"torch.{name}": Kind(dtype) for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": Kind(torch.uint8),
    **{f"torch.{name}": Kind(dtype) for name, dtype in KINDS.items()},
    **dict.fromkeys(STRANGERS, Inert),
}
"""all that a pickle may name"""


class TensorUnpickler(pickle.Unpickler):
    """Follows a pickle that `check_pickle` has seen, with NAMES in the place of everything that it calls."""

    def __init__(self, data: bytes, regions: Callable[[str, int], Region]) -> None:
        """`regions` says where the storage of a key, with so many bytes, lies."""
        super().__init__(io.BytesIO(data))
        self._regions = regions

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for that name."""
        found = NAMES.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it names {module[:80]}.{name[:80]}, which is no part of a tensor")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """A storage, by what torch.save writes in its place."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("it asks for something from outside that is no storage")
        _, kind, key, _, count = pid[:5]
        if not isinstance(kind, Kind) or not isinstance(key, str) or (len(pid) == 6 and pid[5] is not None):
            raise pickle.UnpicklingError("it describes a storage as torch.save does not")
        return Storage(self._regions(key, whole_number(count) * kind.dtype.itemsize), kind.dtype)


def follow_pickle(data: bytes, path: Path, regions: Callable[[str, int], Region]) -> Any:
    """What a pickle that was checked builds; UserError where it names or does anything that weights do not need."""
    try:
        return TensorUnpickler(data, regions).load()
    except PICKLE_ERRORS as error:
        raise UserError(
            f"{path} is refused: {str(error)[:200]}. Only tensors, numbers, texts, lists and dicts are read; nothing "
            "that the file names was run."
        ) from error


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save: dicts, lists, numbers and texts as they are, tensors as `PickledTensor`.

    Raises:
        UserError: it is none, is damaged, compressed, too large without its tensors, or is refused.
    """
    try:
        with path.open("rb"):
            is_archive = zipfile.is_zipfile(path)  # which hides why a file cannot be opened
        if not is_archive:
            raise UserError(f"{path} is no file of torch.save as torch has written them since 1.6. {OTHERWISE}")
        return read_archive(path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, RuntimeError, struct.error) as error:
        raise UserError(f"{path} is damaged or no file of torch.save: {error}. Copy it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_archive(path: Path) -> Any:
    """The content of a zip archive without compression, which is what torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1 or any(name.endswith("/constants.pkl") for name in records):
            raise UserError(f"{path} is no file of torch.save: it holds {len(names)} data.pkl, or TorchScript's code.")
        check_records(path, archive.infolist())
        root = names[0].removesuffix("data.pkl")
        if (order := records.get(f"{root}byteorder")) and archive.read(order) != b"little":
            raise UserError(f"{path} was written on a machine of another byte order.")
        data = archive.read(names[0])
        regions = {name: region_of(path, archive, entry) for name, entry in records.items()}
    end = check_pickle(data, str(path))

    def region(key: str, num_bytes: int) -> Region:
        found = regions.get(f"{root}data/{key}")
        if found is None or found.num_bytes != num_bytes:
            raise pickle.UnpicklingError(f"the storage {key[:80]!r} of {num_bytes:,} bytes is not in the file")
        return found

    return follow_pickle(data[:end], path, region)


def check_records(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuse archives that hold more than their size: compressed records, two of one name, or a huge pickle."""
    size = path.stat().st_size
    if len({entry.filename for entry in entries}) < len(entries):
        raise UserError(f"{path} is refused: two of its records have one name.")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{path} is refused: its records are compressed or encrypted; torch.save's never are.")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path} is damaged: its records are larger than the file. Copy it again.")
    large = [entry.file_size for entry in entries if entry.filename.endswith(".pkl") and entry.file_size > MAX_BYTES]
    if large:
        raise UserError(f"{path} is refused: its pickle has {large[0]:,} bytes without any tensor.")


def region_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Region:
    """Where the bytes of a record lie in the archive's file."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(LOCAL_HEADER)
    if header[:4] != b"PK\3\4":
        raise UserError(f"{path} is damaged: a record is not where it should be. Copy it again.")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = entry.header_offset + LOCAL_HEADER + lengths
    if begin + entry.file_size > path.stat().st_size:
        raise UserError(f"{path} is damaged: it ends too early. Copy it again.")
    return Region(path, begin, entry.file_size, entry.CRC)


def check_bytes(tensors: Iterable[PickledTensor]) -> None:
    """Compare the files' bytes with the checksums that torch.save wrote beside them; each region is read once.

    Raises:
        UserError: a bit has changed since, or a file has become shorter.
    """
    for region in sorted({tensor.region for tensor in tensors}):
        crc = 0
        with region.path.open("rb", buffering=0) as file:
            file.seek(region.begin)
            left = region.num_bytes
            while left and (data := file.read(min(left, CHECKED_AT_A_TIME))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        if crc != region.crc:
            raise UserError(f"{region.path} is damaged: its bytes have another checksum than it says. Copy it again.")
