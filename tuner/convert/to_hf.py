"""A checkpoint to a Hugging Face directory that is proven to hold what was trained."""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tuner.convert.adapter_checkpoint import (
    adapter_origin,
    adapter_pieces,
    is_adapter_checkpoint,
    write_adapter_settings,
)
from tuner.convert.card import write_card
from tuner.convert.checkpoint_files import (
    checkpoint_tensors,
    load_trained,
    verify_read_files,
)
from tuner.convert.output import check_absent, publishing
from tuner.convert.published_names import published, published_tensors
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import Origin, check_reload
from tuner.convert.settings import write_settings
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import Piece, total_bytes
from tuner.engine.checkpoint import check_sizes, find_checkpoint, read_manifest
from tuner.engine.tensor_files import WEIGHTS, TensorFiles

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def convert(
    checkpoint: Path,
    out: Path,
    *,
    dtype: DtypeName = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
) -> Path:
    """Write `out`: weights in safetensors, config, tokenizer and chat template, as transformers loads them.

    Of an adapter's run: adapter_model.safetensors and adapter_config.json, as peft loads them.

    The weights go from file to file a block at a time: memory does not grow with the model, unless `verify`.

    Args:
        checkpoint: a checkpoint directory, or a work dir, whose latest checkpoint is taken.
        out: a directory that does not exist yet, or is empty.
        dtype: of the written weights; "auto" keeps the dtype they were trained in.
        max_shard_size: bytes of a file at most.
        verify: also load `out` in a fresh process and compare it with the checkpoint.

    Raises:
        UserError: no checkpoint there, a damaged one, something in `out` already, or a disk that refuses.
        RuntimeError: what was written is not what was trained; it is not published.
    """
    check_absent(out)
    checkpoint = find_checkpoint(checkpoint)
    check_sizes(checkpoint)
    is_adapter = is_adapter_checkpoint(checkpoint)
    pieces = (adapter_pieces if is_adapter else model_pieces)(checkpoint, DTYPES[dtype])
    stem, size = ("adapter_model", sys.maxsize) if is_adapter else ("model", max_shard_size)  # peft reads one file
    checks = Checks()
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        with ThreadPoolExecutor(1) as pool:  # the files are read twice at the same time: once from the disk
            verified = pool.submit(verify_read_files, checkpoint)
            digests = write_shards(draft, pieces, max_shard_size=size, stem=stem)
            if is_adapter:
                write_adapter_settings(checkpoint, draft)
            else:
                write_settings(checkpoint, draft, dtype_of(pieces))
            verified.result()
        checks.checked.append("every file that was read has the sha256 of the checkpoint's manifest")
        write_card(checkpoint, draft, out.name)
        origin = (adapter_origin if is_adapter else origin_of)(checkpoint)
        check_reload(origin, draft, digests, checks, verify=verify)
        write_record(draft, "checkpoint", facts_of(checkpoint), pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def model_pieces(checkpoint: Path, dtype: torch.dtype | None) -> list[Piece]:
    """The trained tensors as model files have them."""
    return published(checkpoint_tensors(checkpoint), checkpoint / "hf", dtype)


def dtype_of(pieces: Sequence[Piece]) -> torch.dtype:
    """What config.json says of the weights: the dtype of most of their values."""
    counts: dict[torch.dtype, int] = {}
    for piece in pieces:
        counts[piece.dtype] = counts.get(piece.dtype, 0) + piece.num_bytes // piece.dtype.itemsize
    return max(counts, key=lambda dtype: counts[dtype])


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """By what a checkpoint is recognised again."""
    manifest = read_manifest(checkpoint)
    return {"checkpoint": checkpoint.name, "sha256": {name: e["sha256"] for name, e in manifest["files"].items()}}


def origin_of(checkpoint: Path) -> Origin:
    """What the fresh process compares with."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    max_length = state["settings"].get("max_length", 2048)
    return Origin(
        settings=checkpoint / "hf",
        tensors=partial(trained_tensors, checkpoint),
        model=partial(load_trained, checkpoint),
        max_length=max_length,
    )


def trained_tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values, as training itself would read them, in the form of model files."""
    yield from published_tensors(TensorFiles(checkpoint, WEIGHTS), checkpoint / "hf").items()
