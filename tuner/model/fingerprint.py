"""What tells base models apart: a digest of names, dtypes, shapes and bytes of their tensors, however cut in files."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from tuner.model.directory import weight_files

PIECE = 1 << 22


class Base(NamedTuple):
    """The model that an adapter is put on."""

    path: str  # a directory, or a name on the hub
    weights: str = "pretrained"  # or "random": drawn from the config and `seed`
    seed: int = 0

    @property
    def place(self) -> str:
        """The path as it can be found from elsewhere: absolute where it is a directory."""
        return str(Path(self.path).resolve()) if Path(self.path).is_dir() else self.path

    def fingerprint(self) -> str:
        """The same for the same tensors, wherever they lie; read once in a process."""
        if self.weights == "random":
            config, _ = PreTrainedConfig.get_config_dict(self.path)
            drawn = json.dumps({"config": config, "seed": self.seed}, sort_keys=True)
            return "random-" + hashlib.sha256(drawn.encode()).hexdigest()
        return fingerprint_of(str(self.directory()))

    def directory(self) -> Path:
        """Where the weights lie; what is on the hub was fetched when the model was built."""
        place = Path(self.path)
        if place.is_dir():
            return place
        return Path(snapshot_download(self.path, allow_patterns=["*.safetensors*"], local_files_only=True))

    def note(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": self.place, "weights": self.weights, "seed": self.seed, "fingerprint": self.fingerprint()}


@cache
def fingerprint_of(directory: str) -> str:
    """sha256 over the lines `name dtype shape sha256-of-the-bytes` of a model directory's tensors, sorted by name."""
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        lines = sorted(pool.map(describe, tensors_in(weight_files(directory))))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class StoredBytes(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensors_in(paths: Iterable[Path]) -> list[StoredBytes]:
    """Of all files; format: https://github.com/huggingface/safetensors#format."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                found.append(StoredBytes(path, name, entry["dtype"], tuple(entry["shape"]), start, end))
    return found


def describe(tensor: StoredBytes) -> str:
    """One line of what `fingerprint_of` hashes."""
    digest = hashlib.sha256()
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        remaining = tensor.end - tensor.start
        while remaining and (piece := file.read(min(PIECE, remaining))):
            digest.update(piece)
            remaining -= len(piece)
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}"
