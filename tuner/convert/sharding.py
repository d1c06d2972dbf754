"""Weights written as transformers names and indexes them: one safetensors file, or several of at most a given size."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from tuner.convert.tensors import CODES, Piece, total_bytes
from tuner.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]I?B|)", re.IGNORECASE)
DEFAULT_SHARD_SIZE = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def parse_size(text: str) -> int:
    """Bytes: "5GB" -> 5,000,000,000; "200MiB", "1000000".

    Raises:
        UserError: it is no size, or none that holds a byte.
    """
    match = SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text} is no size. Give bytes or, for example, 500MB, 5GB or 4GiB.")
    return size


def split(pieces: Sequence[Piece], max_shard_size: int) -> list[list[Piece]]:
    """Groups of at most `max_shard_size` bytes as the hub's library makes them; a larger piece is one of its own."""
    groups: list[list[Piece]] = []
    current: list[Piece] = []
    for piece in pieces:
        if piece.num_bytes > max_shard_size:
            groups.append([piece])
            continue
        if current and total_bytes(current) + piece.num_bytes > max_shard_size:
            groups.append(current)
            current = []
        current.append(piece)
    return [*groups, current] if current or not groups else groups


def shard_names(count: int, stem: str = "model") -> list[str]:
    """`model.safetensors`, or `model-00001-of-00002.safetensors` and so on."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1)]


def write_shards(
    folder: Path, pieces: Sequence[Piece], *, max_shard_size: int = DEFAULT_SHARD_SIZE, stem: str = "model"
) -> dict[str, str]:
    """Write the pieces into an existing directory, with an index where they take several files.

    Returns:
        sha256 of the bytes of each tensor, by name.

    Raises:
        UserError: two pieces have one name, or a value does not fit its dtype.
        OSError: the disk refused.
    """
    names = [piece.name for piece in pieces]
    if len(set(names)) < len(names):
        raise UserError(
            f"Tensors come twice: {', '.join(sorted({name for name in names if names.count(name) > 1})[:5])}."
        )
    groups = split(pieces, max_shard_size)
    files = shard_names(len(groups), stem)
    digests: dict[str, str] = {}
    with one_thread(), ThreadPoolExecutor(1) as hasher:
        for file, group in zip(files, groups, strict=True):
            digests |= write_file(folder / file, group, hasher)
    if len(groups) > 1:
        weight_map = {piece.name: file for file, group in zip(files, groups, strict=True) for piece in group}
        index = {"metadata": {"total_size": total_bytes(pieces)}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks are too small to be shared: threads would wait for each other, and take the core that hashes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_file(path: Path, pieces: Sequence[Piece], hasher: ThreadPoolExecutor) -> dict[str, str]:
    """One safetensors file, and the sha256 of each of its tensors."""
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # so that each lies at a multiple of its size
    digests = {}
    with path.open("xb", buffering=0) as file:
        write_fully(file, memoryview(header_of(ordered)))
        for piece in ordered:
            digests[piece.name] = write_piece(file, piece, hasher)
    return digests


def header_of(pieces: Sequence[Piece]) -> bytes:
    """Length, JSON and padding, as the safetensors format has them."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in pieces:
        end = place + piece.num_bytes
        header[piece.name] = {"dtype": CODES[piece.dtype], "shape": list(piece.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_piece(file: IO[bytes], piece: Piece, hasher: ThreadPoolExecutor) -> str:
    """A tensor's blocks one after the other; while one is written it is hashed, too."""
    digest, pending = hashlib.sha256(), Future[None]()
    pending.set_result(None)
    num_bytes = 0
    for block in piece.blocks():
        assert block.dtype == piece.dtype, (piece.name, block.dtype, piece.dtype)
        data = memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())
        pending.result()  # two blocks are in memory at most
        pending = hasher.submit(digest.update, data)
        write_fully(file, data)
        num_bytes += len(data)
    pending.result()
    assert num_bytes == piece.num_bytes, (piece.name, num_bytes, piece.num_bytes)
    return digest.hexdigest()


def write_fully(file: IO[bytes], data: memoryview) -> None:
    """All of it: a raw file may take less at once."""
    while data:
        data = data[file.write(data) :]
