"""`tuner convert internevo`: InternEvo's parts to a model directory, to parts for another number of ranks, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tuner.convert.internevo_again import origin_of
from tuner.convert.internevo_parts import (
    CONFIG,
    EMBEDDINGS,
    HEAD,
    Joined,
    Normalized,
    check_divides,
    has_parts,
    in_transformers_order,
    is_interleaved,
    join,
    part_of,
)
from tuner.convert.layout import Source, digest, piece_of
from tuner.convert.llama import check_shapes, read_settings, without_buffers
from tuner.convert.llama_form import internlm2_shapes
from tuner.convert.model_files import model_tensors
from tuner.convert.output import check_absent, publishing
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import check_reload
from tuner.convert.settings import write_json
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import total_bytes
from tuner.convert.tokenizer_files import write_internlm2_companions
from tuner.convert.torch_archive import write_archive
from tuner.errors import UserError
from tuner.model.directory import check_model_directory
from tuner.model.internlm2.configuration import InternLM2Config


def convert_internevo(
    source: Path,
    out: Path,
    *,
    tp: int | None,
    base: Path | None,
    interleaved: bool | None,
    split_hidden: bool | None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
) -> Path:
    """Write parts as a model directory, or parts or a model directory as parts for `tp` ranks.

    Args:
        source: a directory of model_tp*_pp*.pt, or an InternLM2 directory.
        tp: tensor parallel ranks to write parts for; None writes a model directory.
        base: an InternLM2 directory whose tokenizer, and what the parts do not say, go into a model directory.
        interleaved: whether rotary pairs are neighbours in the parts, where their model_config.pt does not say it.
        split_hidden: whether parts have columns of the embedding, not rows; None: as the source, else columns.
        max_shard_size: bytes of a model directory's file at most.
        verify: also load a model directory in a fresh process and compare it with the parts.

    Raises:
        UserError: parts are missing or do not fit, what is needed is not given, or something is in `out`.
        RuntimeError: what was written is not what was read; it is not published.
    """
    check_absent(out)
    if not source.is_dir():
        raise UserError(f"There is no directory {source}. Give one of model_tp*_pp*.pt, or of an InternLM2.")
    if tp is not None and max_shard_size != DEFAULT_SHARD_SIZE:
        raise UserError("--max-shard-size is for a model directory; of parts there is one file a rank (--tp).")
    if has_parts(source):
        model = join(source)
        if tp is None:
            return write_model(source, out, model, place_of(base), interleaved, max_shard_size, verify)
    elif tp is None:
        raise UserError(f"{source} has no model_tp*_pp*.pt. To write a model's parts, say for how many ranks: --tp 4")
    else:
        model = as_parts(source)
    return write_parts(source, out, model, tp, model.embed_split_hidden if split_hidden is None else split_hidden)


def place_of(base: Path | None) -> Path:
    """The directory given as --base; UserError where there is none."""
    if base is None:
        raise UserError(
            "Parts have no tokenizer. Give an InternLM2 directory that has the one they were trained with: --base"
        )
    check_model_directory(str(base))
    return base


def write_model(
    source: Path,
    out: Path,
    model: Joined,
    base: Path,
    interleaved: bool | None,
    max_shard_size: int,
    verify: bool,
) -> Path:
    """The joined parts as an InternLM2 directory."""
    stated = is_interleaved(model.settings)
    if stated is None and interleaved is None:
        raise UserError(
            f"{source / CONFIG} does not say how rotary pairs lie (adapt_hf, rot_embed_HF_impl or qk_interleaved). "
            "Say it: --rotary half (as transformers) or --rotary interleaved (as GPT-J)"
        )
    is_turned = bool(interleaved if stated is None else stated)
    settings = hf_settings(model, json.loads((base / "config.json").read_text(encoding="utf-8")), base)
    tensors = hf_tensors(model, is_turned=is_turned)
    check_shapes(source, tensors, internlm2_shapes(InternLM2Config.from_dict(settings)))
    pieces = [piece_of(name, tensor) for name, tensor in tensors.items()]
    checks = Checks(["the checksums in the parts of all bytes that were read"])
    with publishing(out, num_bytes=total_bytes(pieces)) as draft, TemporaryDirectory() as expected:
        digests = write_shards(draft, pieces, max_shard_size=max_shard_size)
        write_json(draft / "config.json", settings)
        write_internlm2_companions(base, draft)
        origin = origin_of(source, base, Path(expected), is_turned=is_turned)
        check_reload(origin, draft, digests, checks, verify=verify)
        write_record(draft, "internevo", {"parts": source.resolve().name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def hf_settings(model: Joined, base: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """config.json: what the parts say, and of `base` what they do not."""
    if base.get("model_type") != "internlm2":
        raise UserError(f"{place} is of type {base.get('model_type')!r}. Give an InternLM2 directory as --base.")
    said = model.settings
    table = model.tensors[EMBEDDINGS[0]]
    sizes = {
        "architectures": ["InternLM2ForCausalLM"],
        "vocab_size": table.shape[0],
        "hidden_size": table.shape[1],
        "intermediate_size": model.tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith("attention_norm.weight") for name in model.tensors),
        "num_attention_heads": said["num_attention_heads"],
        "num_key_value_heads": said["num_kv_attention_heads"],
        "bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(table.dtype).removeprefix("torch."),
    }
    names = {"layer_norm_epsilon": "rms_norm_eps", "rope_base": "rope_theta"}
    stated = {ours: said[theirs] for theirs, ours in names.items() if isinstance(said.get(theirs), (int, float))}
    kept = {key: value for key, value in base.items() if key not in ("auto_map", "transformers_version", "dtype")}
    return {**kept, **sizes, **stated}


def hf_tensors(model: Joined, *, is_turned: bool) -> dict[str, Source]:
    """The joined tensors by transformers' names and in its rotary order."""
    found: dict[str, Source] = {}
    for name, source in model.tensors.items():
        if is_turned and name.endswith("wqkv.weight"):
            source = in_transformers_order(source, model.heads)
        if name == HEAD and model.settings.get("norm_head"):
            source = Normalized(source)
        found[name if name == HEAD else f"model.{name}"] = source
    return found


def as_parts(source: Path) -> Joined:
    """A model directory under the names of parts, with a model_config.pt as InternEvo's own conversion writes it."""
    tensors = without_buffers(model_tensors(source))
    stored = read_settings(source, "internlm2", "internevo")
    config = InternLM2Config.from_pretrained(source)
    if config.bias:
        raise UserError(f"{source} has biases in its projections; parts of InternLM2 with them are not known.")
    if config.rope_scaling:
        raise UserError(
            f"{source} has rope_scaling {config.rope_scaling}, which parts cannot state: they hold rope_base alone. "
            "Set rope_scaling to null in its config.json, and scale in InternEvo's config."
        )
    if config.tie_word_embeddings:
        tensors.setdefault(HEAD, tensors["model.tok_embeddings.weight"])
    expected = internlm2_shapes(config)
    check_shapes(source, tensors, {**expected, HEAD: expected["model.tok_embeddings.weight"]})
    stated = str(stored.get("torch_dtype", stored.get("dtype", "bfloat16")))
    settings = {
        "num_chunks": 1,
        "dtype": getattr(torch, stated),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_attention_heads": config.num_key_value_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rope_base": config.rope_theta,
        "norm_type": "rmsnorm",
        "no_bias": True,
        "norm_head": False,
        "adapt_hf": True,
        "embed_split_hidden": True,
    }
    return Joined({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, settings, "", True)


def write_parts(source: Path, out: Path, model: Joined, tp: int, split_hidden: bool) -> Path:
    """A file for each of `tp` ranks, all layers in it; of each a block is in memory at a time."""
    check_divides(model.tensors, tp, model.heads.num_key_value_heads, split_hidden)
    settings = {**model.settings, "embed_split_hidden": split_hidden}
    pieces = [piece_of(name, tensor) for name, tensor in model.tensors.items()]
    checks = Checks(not_checked=["a forward pass of the parts, which only InternEvo can do"])
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        for rank in range(tp):
            part = {
                model.prefix + name: piece_of(name, part_of(name, tensor, rank, tp, split_hidden))
                for name, tensor in model.tensors.items()
            }
            write_archive(draft / f"model_tp{rank}_pp0.pt", part)
        torch.save(settings, draft / CONFIG)
        digests = compare(model, join(draft), source)
        checks.checked.append(f"all {len(digests)} tensors, joined from the written files, against the bytes that came")
        write_record(draft, "internevo parts", {"model": source.resolve().name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def compare(expected: Joined, found: Joined, source: Path) -> dict[str, str]:
    """What the written parts give when joined again: the sha256 of each; RuntimeError where that is not what came."""
    if expected.tensors.keys() != found.tensors.keys():
        raise RuntimeError(f"tensors of {source} got lost; the directory was not published")
    digests = {name: digest(tensor) for name, tensor in expected.tensors.items()}
    for name, tensor in found.tensors.items():
        if tensor.shape != expected.tensors[name].shape or digest(tensor) != digests[name]:
            raise RuntimeError(f"{name} differs from what was read; the directory was not published")
    return digests
