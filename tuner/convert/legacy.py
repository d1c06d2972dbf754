"""`tuner convert legacy`: pickled weights of XTuner, mmengine, DeepSpeed and torch.save become safetensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.convert.layout import Reshaped, Source, leaves, piece_of
from tuner.convert.model_files import copy_companions
from tuner.convert.old_adapter import WEIGHTS, adapter_pieces, find_alpha, is_adapter, write_adapter_config
from tuner.convert.output import check_absent, publishing
from tuner.convert.pickled import PickledTensor, check_bytes, read_pickle
from tuner.convert.record import Checks, write_record
from tuner.convert.settings import write_json
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import Piece, fit, total_bytes
from tuner.convert.verified import compare_pieces
from tuner.convert.zero_files import MODEL_FILE, read_zero
from tuner.errors import UserError
from tuner.model.directory import check_model_directory, inside
from tuner.model.hollow import stored_names

INSIDE = ("state_dict", "module", "model")
"""where a file of mmengine, DeepSpeed or others has its weights, unless it is nothing but weights"""
WRAPPERS = ("module.", "llm.")
"""before all names: torch's class around a model, XTuner's method inside it"""
PARTS = ("pytorch_model*.bin", "pytorch_model*.pt")
LATEST = "latest"
MAX_NESTING = 6  # dicts and lists in which texts of a config are looked for


def convert_legacy(
    source: Path,
    out: Path,
    *,
    allow: bool,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> Path:
    """Write the weights of an old file or directory to `out`: a model where `base` is given, or an adapter of LoRA.

    Args:
        allow: the user wants pickles to be read.
        base: a model directory; its config and tokenizer go beside the weights, which must fit them.
        dtype: of the written weights; None keeps that of each.
        lora_alpha: of LoRA weights, where no config in the file states it.

    Raises:
        UserError: `allow` is missing, a file is damaged or refused, weights do not fit, or something is in `out`.
    """
    check_absent(out)
    if not source.exists():
        raise UserError(f"There is no {source}. Give a .pth, .pt or .bin file, or a directory of DeepSpeed's.")
    if not allow:
        raise UserError(
            f"{source} holds pickles, which run whatever code is in them when others open them. With "
            "--allow-legacy-pickle they are read for their tensors alone: nothing that they name is imported or called."
        )
    if base is not None:
        check_model_directory(str(base))
    weights, texts = read_weights(source)
    check_bytes({leaf for tensor in weights.values() for leaf in leaves(tensor) if isinstance(leaf, PickledTensor)})
    weights = unwrapped(weights, source)
    checks = Checks([f"the checksums in {source.name} of all bytes that were read"])
    if is_adapter(weights):
        pieces, settings, num_left = adapter_pieces(weights)
        alpha = find_alpha(texts) if lora_alpha is None else lora_alpha
        if num_left:
            checks.not_checked.append(f"{num_left} tensors of the file that are no adapter were left out")
    else:
        fitting = weights if base is None else fitted(weights, base, source)
        pieces, settings = [whole_piece(name, tensor) for name, tensor in fitting.items()], {}
    pieces = [cast_piece(piece, dtype) for piece in pieces]
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        digests = write_shards(draft, pieces, max_shard_size=max_shard_size, stem=WEIGHTS if settings else "model")
        if settings:
            write_adapter_config(draft, settings, alpha, base)
        elif base is not None:
            copy_companions(base, draft)
            state_dtype(draft, pieces)
        checks.checked.append(compare_pieces(pieces, draft))
        write_record(draft, "legacy", {"file": source.name}, pieces, digests, checks)
    return out


def read_weights(source: Path) -> tuple[dict[str, Source], list[str]]:
    """Weights by the names in the file or directory, and all texts that stand beside them."""
    if source.is_dir():
        return read_directory(source)
    content = read_pickle(source)
    if not isinstance(content, dict):
        raise UserError(f"{source} holds a {type(content).__name__}, no weights by name.")
    inside = next((content[key] for key in INSIDE if isinstance(content.get(key), dict)), content)
    weights = {name: tensor for name, tensor in inside.items() if isinstance(tensor, PickledTensor)}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f"{source} holds no weights by name; it has {', '.join(str(key)[:40] for key in list(content)[:8])}. "
            f"Known are files of weights alone, and those with {' or '.join(INSIDE[:2])}. For a file of DeepSpeed give "
            "its directory."
        )
    return named(weights), list(texts_in(content))


def read_directory(source: Path) -> tuple[dict[str, Source], list[str]]:
    """A checkpoint of DeepSpeed, a directory that has one, or one of pytorch_model.bin files."""
    if any(MODEL_FILE.fullmatch(path.name) for path in source.iterdir()):
        weights, states = read_zero(source)
        return weights, list(texts_in({key: states[key] for key in ("meta",) if key in states}))
    latest = source / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or not (source / name).is_dir() or (source / name).is_symlink():
            raise UserError(f"{latest} names {name[:80]!r}, no directory beside it. Give the directory itself.")
        return read_directory(source / name)
    files = sorted({path for pattern in PARTS for path in source.glob(pattern)})
    if not files:
        raise UserError(
            f"{source} has no *_model_states.pt of DeepSpeed, no {LATEST} and no pytorch_model*.bin. Give the "
            "directory that has them, or a file."
        )
    found: dict[str, Source] = {}
    for path in files:
        weights, _ = read_weights(inside(source, path.name))
        if twice := sorted(found.keys() & weights.keys()):
            raise UserError(f"{path} has {twice[0]} a second time. Leave only the files of one model in {source}.")
        found |= weights
    check_index(source, found, files)
    return found, []


def check_index(source: Path, found: Mapping[str, Source], files: list[Path]) -> None:
    """All that an index beside the files names must be there; it opens no file."""
    for path in source.glob("pytorch_model*.bin.index.json"):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(set(index) - set(found))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no index of weights: {error!r}. Copy it again.") from error
        if missing:
            raise UserError(f"{path} names {missing[0]}, which none of the {len(files)} files has. Copy them again.")


def named(weights: Mapping[str, PickledTensor]) -> dict[str, Source]:
    """Tensors that know their names, for messages."""
    return {name: replace(tensor, name=name) for name, tensor in weights.items()}


def texts_in(content: Any, depth: int = 0) -> Iterator[str]:
    """All texts in dicts and lists of a file; among them the config that trained it."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)) and depth < MAX_NESTING:
        for value in content.values() if isinstance(content, dict) else content:
            yield from texts_in(value, depth + 1)


def unwrapped(weights: Mapping[str, Source], source: Path) -> dict[str, Source]:
    """Names without what stands before all of them; UserError where there is more than a language model."""
    for prefix in WRAPPERS:
        if any(name.startswith(prefix) for name in weights):
            others = [name for name in weights if not name.startswith(prefix)]
            if others:
                raise UserError(
                    f"{source} holds more than a language model: {', '.join(sorted(others)[:3])} beside {prefix}*. "
                    "Only language models are converted."
                )
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def fitted(weights: Mapping[str, Source], base: Path, source: Path) -> dict[str, Source]:
    """The weights that the base's architecture has; UserError listing what is missing, unknown or of another shape."""
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{base} is no causal language model that transformers knows: {str(error)[:200]}") from error
    expected, repeated = stored_names(llm), set(llm.state_dict())
    computed = {name for name in weights if name.endswith("inv_freq")}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in repeated | set(expected) | computed]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"The weights of {source} do not fit {base / 'config.json'}: {'; '.join(problems[:5])}{more}.")
    return {name: weights[name] for name in expected}


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
    most = max(pieces, key=lambda piece: piece.num_bytes).dtype
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(most).removeprefix("torch.")
    if not list(draft.glob("*.py")):
        settings.pop("auto_map", None)
    write_json(path, settings)
