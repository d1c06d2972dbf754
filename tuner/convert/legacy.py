"""`tuner convert legacy`: pickled weights of XTuner, mmengine, DeepSpeed and torch.save become safetensors."""

import json
import sys
from pathlib import Path

import torch

from tuner.convert.layout import Reshaped, Source, leaves, piece_of
from tuner.convert.legacy_again import origin_of
from tuner.convert.legacy_files import check_changes, fitted, read_weights
from tuner.convert.model_files import copy_companions
from tuner.convert.old_adapter import (
    WEIGHTS,
    adapter_pieces,
    changed_shapes,
    find_alpha,
    is_adapter,
    write_adapter_config,
)
from tuner.convert.output import check_absent, publishing
from tuner.convert.pickled import PickledTensor, check_bytes
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import check_reload
from tuner.convert.settings import write_json
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import Piece, fit, total_bytes
from tuner.convert.to_hf import DTYPES, DtypeName, dtype_of
from tuner.errors import UserError
from tuner.model.directory import check_model_directory


def convert_legacy(
    source: Path,
    out: Path,
    *,
    allow: bool,
    base: Path | None = None,
    dtype: DtypeName = "auto",
    lora_alpha: float | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
) -> Path:
    """Write the weights of an old file or directory to `out`: a model where `base` is given, or an adapter of LoRA.

    Args:
        allow: the user wants pickles to be read.
        base: a model directory whose config and tokenizer go beside the weights; of LoRA, the model that they change.
        dtype: of the written weights; "auto" keeps that of each.
        lora_alpha: of LoRA weights, where no config in the file states it.
        max_shard_size: bytes of a model's file at most.
        verify: also load `out` in a fresh process and compare it with the old file.

    Raises:
        UserError: `allow` is missing, a file is damaged or refused, weights do not fit, or something is in `out`.
        RuntimeError: what was written is not what was read; it is not published.
    """
    check_absent(out)
    check_given(source, base, allow)
    weights, texts = read_weights(source)
    check_bytes({leaf for tensor in weights.values() for leaf in leaves(tensor) if isinstance(leaf, PickledTensor)})
    checks = Checks([f"the checksums in {source.name} of all bytes that were read"])
    if is_adapter(weights):
        pieces, settings, num_left = adapter_pieces(weights)
        alpha = find_alpha(texts) if lora_alpha is None else lora_alpha
        if base is not None:
            check_changes(changed_shapes(pieces), base, source)
        if num_left:
            checks.not_checked.append(f"{num_left} tensors of the file that are no adapter were left out")
    else:
        fitting = weights if base is None else fitted(weights, base, source)
        pieces, settings, alpha = [whole_piece(name, tensor) for name, tensor in fitting.items()], {}, None
    pieces = [cast_piece(piece, DTYPES[dtype]) for piece in pieces]
    stem, size = (WEIGHTS, sys.maxsize) if settings else ("model", max_shard_size)  # peft reads one file
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        digests = write_shards(draft, pieces, max_shard_size=size, stem=stem)
        if alpha is not None:
            write_adapter_config(draft, settings, alpha, base)
        elif base is not None:
            copy_companions(base, draft)
            state_dtype(draft, pieces)
        check_reload(origin_of(source, draft, base, texts, alpha), draft, digests, checks, verify=verify)
        write_record(draft, "legacy", {"file": source.name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def check_given(source: Path, base: Path | None, allow: bool) -> None:
    """Refuse places that hold nothing, and pickles where nobody said that they may be read."""
    if not source.exists():
        raise UserError(f"There is no {source}. Give a .pth, .pt or .bin file, or a directory of DeepSpeed's.")
    if not allow:
        raise UserError(
            f"{source} holds pickles, which run whatever code is in them when others open them. With "
            "--allow-legacy-pickle they are read for their tensors alone: nothing that they name is imported or called."
        )
    if base is not None:
        check_model_directory(str(base))


def whole_piece(name: str, tensor: Source) -> Piece:
    """To be written as it is; a single number has no rows."""
    if isinstance(tensor, PickledTensor) and not tensor.shape:
        return Piece(name, tensor.dtype, (), lambda: [tensor.whole()])
    if isinstance(tensor, Reshaped) and not tensor.shape:
        return piece_of(name, tensor.source, ())
    return piece_of(name, tensor)


def cast_piece(piece: Piece, dtype: torch.dtype | None) -> Piece:
    """The same in another dtype; integers stay what they are."""
    if dtype is None or piece.dtype == dtype or not piece.dtype.is_floating_point:
        return piece
    return Piece(piece.name, dtype, piece.shape, lambda: (fit(block, dtype, piece.name) for block in piece.blocks()))


def state_dtype(draft: Path, pieces: list[Piece]) -> None:
    """Let config.json say which dtype most of the weights have, and name no code that is not there."""
    path = draft / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    most = str(dtype_of(pieces)).removeprefix("torch.")
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = most
    if not list(draft.glob("*.py")):
        settings.pop("auto_map", None)
    write_json(path, settings)
