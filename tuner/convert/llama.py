"""`tuner convert llama` and `internlm2`: a model directory in the other's form, read back and compared bit for bit."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from tuner.convert.layout import Source, digest, piece_of
from tuner.convert.llama_again import Tensors, fused_tensors, origin_of, split_tensors
from tuner.convert.llama_form import (
    Shapes,
    Sources,
    as_internlm2,
    as_llama,
    heads_of,
    internlm2_settings,
    internlm2_shapes,
    llama_settings,
    llama_shapes,
)
from tuner.convert.model_files import model_tensors
from tuner.convert.output import check_absent, publishing
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import check_reload
from tuner.convert.settings import write_json
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import total_bytes
from tuner.convert.tokenizer_files import write_internlm2_companions, write_llama_companions
from tuner.errors import UserError
from tuner.model.build import read_config
from tuner.model.internlm2.configuration import InternLM2Config


def convert_to_llama(model: Path, out: Path, *, max_shard_size: int = DEFAULT_SHARD_SIZE, verify: bool = True) -> Path:
    """Write an InternLM2 directory as one of Llama, which needs no code beyond transformers.

    Raises:
        UserError: `model` is none, its weights do not fit its config, or something is in `out`.
        RuntimeError: what was written is not what was read; it is not published.
    """
    check_absent(out)
    tensors = without_buffers(model_tensors(model))
    settings = read_settings(model, "internlm2", "llama")
    config = read_config(str(model))
    assert isinstance(config, InternLM2Config)
    check_shapes(model, tensors, with_tied_head(internlm2_shapes(config), tensors, "output", "model.tok_embeddings"))
    heads = heads_of(config)
    form = Form(
        "llama", llama_settings(config, settings), as_llama(tensors, heads), write_llama_companions, split_tensors
    )
    return write_form(model, out, tensors, form, lambda found: as_internlm2(found, heads), max_shard_size, verify)


def convert_to_internlm2(
    model: Path, out: Path, *, max_shard_size: int = DEFAULT_SHARD_SIZE, verify: bool = True
) -> Path:
    """Write a Llama directory as one of InternLM2; errors as in `convert_to_llama`."""
    check_absent(out)
    tensors = without_buffers(model_tensors(model))
    settings = read_settings(model, "llama", "internlm2")
    llama = read_config(str(model))
    assert isinstance(llama, LlamaConfig)
    written = internlm2_settings(llama, settings)
    config = InternLM2Config.from_dict(written)
    heads = heads_of(config)
    shapes = with_tied_head(llama_shapes(config), tensors, "lm_head", "model.embed_tokens")
    check_shapes(model, tensors, shapes)
    form = Form("internlm2", written, as_internlm2(tensors, heads), write_internlm2_companions, fused_tensors)
    return write_form(model, out, tensors, form, lambda found: as_llama(found, heads), max_shard_size, verify)


@dataclass(frozen=True)
class Form:
    """What is to be written."""

    kind: str
    settings: dict[str, Any]
    tensors: Sources
    companions: Callable[[Path, Path], None]
    """writes tokenizer and stop tokens"""
    again: Tensors
    """the tensors once more, from the source's directory, by other code"""


def with_tied_head(shapes: Shapes, tensors: Sources, head: str, table: str) -> Shapes:
    """With the head that some files hold although it is tied to the embedding."""
    return {**shapes, f"{head}.weight": shapes[f"{table}.weight"]} if f"{head}.weight" in tensors else shapes


def without_buffers(tensors: Mapping[str, Source]) -> Sources:
    """Old files hold rotary frequencies, which are computed anew."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def write_form(
    model: Path,
    out: Path,
    tensors: Sources,
    form: Form,
    back: Callable[[Sources], Sources],
    max_shard_size: int,
    verify: bool,
) -> Path:
    """Write the directory, read it again, and compare what comes back through the other direction with the source."""
    pieces = [piece_of(name, source) for name, source in form.tensors.items()]
    checks = Checks()
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        digests = write_shards(draft, pieces, max_shard_size=max_shard_size)
        write_json(draft / "config.json", form.settings)
        form.companions(model, draft)
        compare(tensors, back(dict(model_tensors(draft))))
        checks.checked.append("every tensor, read from the written files and mapped back, has the bytes of the source")
        check_reload(origin_of(model, form.again), draft, digests, checks, verify=verify)
        write_record(draft, form.kind, {"model": model.resolve().name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def compare(expected: Mapping[str, Source], found: Mapping[str, Source]) -> None:
    """Both have the same names and bytes; RuntimeError where they differ."""
    if expected.keys() != found.keys():
        raise RuntimeError(f"{sorted(expected.keys() ^ found.keys())[:5]} got lost; the directory was not published")
    for name, tensor in expected.items():
        if digest(tensor) != digest(found[name]):
            raise RuntimeError(f"{name} differs from what was read; the directory was not published")


def read_settings(model: Path, model_type: str, other: str) -> dict[str, Any]:
    """config.json of a model of that type.

    Raises:
        UserError: it is of another architecture, or quantised.
    """
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        came, names = settings["model_type"], settings.get("architectures") or []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model / 'config.json'} is no configuration of a model: {error!r}.") from error
    if came != model_type or any(not name.endswith("ForCausalLM") for name in names):
        raise UserError(
            f"{model} is a {' or '.join(names) or 'model'} of type {came!r}; `tuner convert {other}` takes a causal "
            f"language model of type {model_type!r}."
        )
    if settings.get("quantization_config"):
        raise UserError(f"{model} is quantised. Give the model with its plain weights.")
    return settings


def check_shapes(place: Path, found: Mapping[str, Source], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with those that the configuration says.

    Raises:
        UserError: listing what is missing, what is there too much and what has another shape.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"The weights of {place} do not fit its config.json: {'; '.join(problems[:5])}{more}.")
