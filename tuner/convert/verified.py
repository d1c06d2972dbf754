"""What was written, read again from the disk and compared with what it was made from."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tuner.convert.tensors import Piece, stored_tensors


def compare_pieces(pieces: Sequence[Piece], draft: Path) -> str:
    """Make each tensor once more and compare its bytes with those in the files; gives what was done, in words.

    Raises:
        RuntimeError: they differ; then nothing is published.
    """
    written = {name: tensor for path in draft.glob("*.safetensors") for name, tensor in stored_tensors(path).items()}
    if written.keys() != {piece.name for piece in pieces}:
        raise RuntimeError(f"{draft} has other tensors than were to be written; it was not published")
    for piece in pieces:
        found = written[piece.name]
        is_same = (found.dtype, found.shape) == (piece.dtype, piece.shape)
        if not is_same or sha256(found.blocks()) != sha256(piece.blocks()):
            raise RuntimeError(f"{piece.name} differs from what it was made from; the directory was not published")
    return f"the bytes of all {len(pieces)} tensors, read back from the files, against what they were made from"


def sha256(blocks: Iterable[torch.Tensor]) -> str:
    """Of the bytes of all blocks."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
