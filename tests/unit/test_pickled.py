"""The reader of old pickles: tensors as torch.load gives them, and nothing else from any file, however it is made."""

import io
import pickle
import random
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub

from tuner.convert.pickled import PickledTensor, check_bytes, read_pickle
from tuner.errors import UserError

BASE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Any] = {
    "whole": BASE,
    "transposed": BASE.t(),
    "rows of a larger one": BASE[2:4],
    "columns": BASE.chunk(2, 1)[1],
    "bfloat16": BASE.bfloat16(),
    "half": BASE.half(),
    "double": BASE.double(),
    "float8": BASE.to(torch.float8_e4m3fn),
    "float8, transposed": BASE.to(torch.float8_e4m3fn).t(),
    "parameter": torch.nn.Parameter(BASE),
    "integers": torch.arange(5),
    "booleans": BASE > 0,
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


def test_every_tensor_is_what_torch_loads(tmp_path: Path) -> None:
    torch.save(KINDS, tmp_path / "kinds.pth")
    read, loaded = read_pickle(tmp_path / "kinds.pth"), torch.load(tmp_path / "kinds.pth", weights_only=True)
    for name, expected in loaded.items():
        tensor = read[name].whole()
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(tensor.double(), expected.double()), name
        blocks = torch.cat([block.reshape(-1) for block in read[name].blocks()] or [tensor.reshape(-1)])
        assert torch.equal(blocks.double(), expected.double().reshape(-1)), name
    check_bytes([read[name] for name in KINDS])


def test_what_mmengine_saves_beside_weights_is_passed_over(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("test_pickled")
    hub.update_scalar("train/loss", 1.0)  # holds numpy arrays, and functions that are named by getattr
    meta = {"config": "raise SystemExit", "seed": 0, "settings": ConfigDict(lr=0.1)}
    saved = {"state_dict": torch.nn.Linear(3, 2).state_dict(), "meta": meta, "message_hub": hub.state_dict()}
    torch.save(saved, tmp_path / "iter_1.pth")
    read = read_pickle(tmp_path / "iter_1.pth")
    assert {name: tensor.shape for name, tensor in read["state_dict"].items()} == {"weight": (2, 3), "bias": (2,)}
    assert read["meta"]["config"] == "raise SystemExit"


def archive(path: Path, data: bytes, **records: bytes) -> Path:
    """A zip archive as torch.save writes it, with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/byteorder", b"little")
        for key, content in records.items():
            file.writestr(f"a/data/{key}", content)
    return path


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Attribute:
    """Pickles as a look-up in another object."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


class Outside(pickle.Pickler):
    """Writes persistent ids as they are given."""

    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Pid) else None


class Pid:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid


def dumped(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Outside(buffer, protocol).dump(value)
    return buffer.getvalue()


def stored(dtype: type = torch.FloatStorage, key: str = "0", count: Any = 4) -> Pid:
    return Pid("storage", dtype, key, "cpu", count)


def tensor(storage: Any, offset: Any = 0, size: Any = (4,), stride: Any = (1,)) -> Calls:
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def code(text: str) -> bytes:
    """A pickle that evaluates a text."""
    return dumped(Calls(eval, text))


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b")" + b"\x85" * depth + b"."


def doubled(times: int) -> bytes:
    """((x, x), (x, x)) ...: few bytes, whose hash takes 2 ** times steps."""
    pairs = b"".join(b"q" + bytes([place]) + b"h" + bytes([place]) + b"\x86" for place in range(times))
    return b"\x80\x02}K\x01" + pairs + b"K\x01s."


HOSTILE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system": (lambda mark: dumped(Calls(__import__("os").system, f"touch {mark}")), "posix.system"),
    "eval": (lambda mark: code(f"open({mark!r}, 'w')"), "eval, which is no part"),
    "exec": (lambda mark: dumped(Calls(exec, f"open({mark!r}, 'w')")), "exec"),
    "open": (lambda mark: dumped(Calls(open, mark, "w")), "open"),
    "import": (lambda mark: dumped(Calls(__import__, "test_pickled_evil")), "__import__"),
    "a module that acts when imported": (lambda mark: b"\x80\x02ctest_pickled_evil\nThing\n.", "test_pickled_evil"),
    "getattr of a module": (lambda mark: dumped(Attribute(torch.Tensor, "__init__")), "attribute with getattr"),
    "making the tensor class": (lambda mark: b"\x80\x02ctorch\nTensor\n)\x81.", "NEWOBJ"),
    "calling the tensor class": (lambda mark: b"\x80\x02ctorch\nTensor\n)R.", "not callable"),
    "a tensor by another function": (
        lambda mark: dumped(Calls(torch._tensor._rebuild_from_type_v2, torch.Size, torch.Tensor, ((1,),), {})),
        "of what is none",
    ),
    "a tensor by a function of its own": (
        lambda mark: b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(X\1\0\0\0actorch\nTensor\n)}tR.",
        "as torch.save does not",
    ),
    "getattr of a stand-in": (
        lambda mark: b"\x80\x02c__builtin__\ngetattr\nctorch\nSize\nX\x03\0\0\0abc\x86R.",
        "getattr",
    ),
    "getattr of a text": (lambda mark: b"\x80\x02c__builtin__\ngetattr\nX\1\0\0\0aX\1\0\0\0b\x86R.", "getattr"),
    "calling what getattr gave": (
        lambda mark: b"\x80\x02c__builtin__\ngetattr\ncnumpy\ndtype\nX\1\0\0\0a\x86R)R.",
        "not callable",
    ),
    "names of the newer protocol": (lambda mark: pickle.dumps(Calls(eval, "1"), 4), "FRAME|STACK_GLOBAL"),
    "an instruction of old pickles": (lambda mark: b"(S'touch'\nios\nsystem\n.", "is refused: its pickle has"),
    "copyreg's extensions": (lambda mark: b"\x80\x02\x82\x01.", "EXT1"),
    "a persistent id of its own": (lambda mark: dumped(Pid("module", "os")), "no storage"),
    "a persistent id that is a text": (lambda mark: b"\x80\x02X\1\0\0\0aQ.", "no storage"),
    "a storage of another file": (lambda mark: dumped(tensor(stored(key="../../passwd"))), "not in the file"),
    "a storage larger than its record": (lambda mark: dumped(tensor(stored(count=9))), "not in the file"),
    "a storage of negative size": (lambda mark: dumped(tensor(stored(count=-4))), "no tuple of numbers"),
    "a tensor beyond its storage": (lambda mark: dumped(tensor(stored(), 1)), "outside"),
    "a tensor before its storage": (lambda mark: dumped(tensor(stored(), -1)), "no tuple of numbers"),
    "a number repeated a trillion times": (lambda mark: dumped(tensor(stored(), 0, (10**12,), (0,))), "outside"),
    "a tensor of no storage": (lambda mark: dumped(tensor("text")), "no storage"),
    "a shape of texts": (lambda mark: dumped(tensor(stored(), 0, ("a",), (1,))), "no tuple of numbers"),
    "attributes of a stand-in": (lambda mark: b"\x80\x02ctorch\nSize\n}X\1\0\0\0aK\1sb.", "no object of its own"),
    "attributes of a dtype": (lambda mark: b"\x80\x02ctorch\nfloat32\n}X\5\0\0\0dtypeK\1sb.", "no object of its own"),
    "attributes of a tensor": (
        lambda mark: dumped(tensor(stored()))[:-1] + b"}X\4\0\0\0pathX\4\0\0\0/etcsb.",
        "no object of its own",
    ),
    "a huge allocation": (lambda mark: dumped(Calls(bytearray, 10**12)), "bytearray"),
    "deep nesting": (lambda mark: nested(100_000), "nests"),
    "a key whose hash takes for ever": (lambda mark: doubled(40), "nests"),
    "a place far off in the memo": (lambda mark: b"\x80\x02Nr\xff\xff\xff\x7f.", "memo"),
    "a value that is missing": (lambda mark: b"\x80\x02\x85.", "no whole pickle"),
    "the middle of a pickle": (lambda mark: dumped({"a": [1, 2, 3]})[:9], "no whole pickle"),
    "nothing": (lambda mark: b"", "no whole pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_ran(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "test_pickled_evil.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    make, message = HOSTILE[name]
    path = archive(tmp_path / "evil.pth", make(str(mark)), **{"0": struct.pack("4f", 1, 2, 3, 4)})
    with pytest.raises(UserError, match=message):
        read_pickle(path)
    assert not mark.exists()
    assert "test_pickled_evil" not in sys.modules


def test_the_hostile_ones_would_run_elsewhere(tmp_path: Path) -> None:
    pickle.loads(HOSTILE["exec"][0](str(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: zipped(path, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "no file of torch.save"),
        (lambda path: path.write_bytes(b""), "no file of torch.save"),
        (lambda path: torch.save(BASE, path, _use_new_zipfile_serialization=False), "save it again"),
        (lambda path: path.write_bytes(saved()[: len(saved()) // 2]), "no file of torch.save"),
        (lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)), "TorchScript"),
        (lambda path: path.mkdir(), "cannot be read"),
    ],
    ids=[
        "a zip bomb",
        "a plain pickle",
        "an empty file",
        "torch before 1.6",
        "half a file",
        "TorchScript",
        "a directory",
    ],
)
def test_other_files_are_told_apart(make: Callable, message: str, tmp_path: Path) -> None:
    make(tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        read_pickle(tmp_path / "file.pth")


def zipped(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", dumped(tensor(stored(count=1 << 20))))
        file.writestr("a/data/0", bytes(4 << 20))


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": BASE, "bias": BASE[0].clone()}, buffer)
    return buffer.getvalue()


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    data = bytearray(saved())
    path = tmp_path / "file.pth"
    place = data.index(BASE.numpy().tobytes())
    data[place + 100] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum"):
        check_bytes(read_pickle(path).values())


def test_mutated_files_give_their_tensors_or_one_message(tmp_path: Path) -> None:
    whole, path, draw = saved(), tmp_path / "file.pth", random.Random(0)
    outcomes = Counter()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data)) if draw.random() < 0.3 else draw.randrange(64, 400)
            data[place] = draw.randrange(256)
        path.write_bytes(bytes(data))
        try:
            found = read_pickle(path)
            outcomes["read"] += 1
            check_bytes([value for value in getattr(found, "values", list)() if isinstance(value, PickledTensor)])
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["read"] > 20
    assert outcomes["refused"] > 100
