"""A checkpoint to a Hugging Face directory that is proven to hold what was trained."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tuner.dataset.jinja_template import resolve_template
from tuner.dataset.templates import ChatTemplate, trained_with
from tuner.engine.checkpoint import find_checkpoint, verify_checkpoint
from tuner.errors import UserError
from tuner.model.tokenizer import build_tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def convert(checkpoint: Path, out: Path, *, dtype: DtypeName = "auto") -> Path:
    """Write `out`: weights in safetensors, config, tokenizer and chat template, as transformers loads them.

    Args:
        checkpoint: a checkpoint directory, or a work dir, whose latest checkpoint is taken.
        out: a directory that does not exist yet, or is empty.
        dtype: of the written weights; "auto" keeps the dtype they were trained in.

    Raises:
        UserError: no checkpoint there, a damaged one, or something in `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; nothing was written. Choose another directory or remove it.")
    checkpoint = find_checkpoint(checkpoint)
    verify_checkpoint(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        draft = Path(name) / "hf"
        write_model(checkpoint, draft, DTYPES[dtype])
        write_tokenizer(checkpoint / "hf", draft)
        write_remote_code(checkpoint / "hf", draft)
        compare_weights(checkpoint, draft)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    return out


def load_trained(checkpoint: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model as it was trained, in `dtype` or in that of the weights, from what lies in the checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        for path in [*(checkpoint / "hf").iterdir(), *checkpoint.glob("model-*.safetensors")]:
            (Path(name) / path.name).symlink_to(path.resolve())
        write_index(Path(name))
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or stored_dtype(checkpoint), use_safetensors=True, trust_remote_code=False
        )


def write_index(folder: Path) -> None:
    """The index by which transformers finds weights spread over several files."""
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {key: shard.name for shard in shards for key in keys_of(shard)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_model(checkpoint: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Weights, config.json and generation_config.json, the last with the stop tokens of the chat template."""
    llm = load_trained(checkpoint, dtype)
    tokenizer = build_tokenizer(str(checkpoint / "hf"))
    template = read_template(checkpoint / "hf")
    stops = [tokenizer.eos_token, *(template.stop_tokens if template else ())]
    names = [token for token in dict.fromkeys(stops) if token is not None]
    generation = llm.generation_config or GenerationConfig()
    generation.eos_token_id = tokenizer.convert_tokens_to_ids(names)
    generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    llm.generation_config = generation
    llm.save_pretrained(out)


def write_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files, with a chat template that renders the ids of training."""
    tokenizer = build_tokenizer(str(source))
    template = read_template(source)
    if template:
        tokenizer.chat_template = template.jinja
        shutil.copy(source / "template.json", out / "template.json")
    tokenizer.save_pretrained(out)


def write_remote_code(source: Path, out: Path) -> None:
    """The published .py files for loaders that need them; an `auto_map` to files that nobody has would only mislead."""
    for path in source.glob("*.py"):
        shutil.copy(path, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config and not list(source.glob("*.py")):
        del config["auto_map"]
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_template(source: Path) -> ChatTemplate | None:
    """The chat template that the run was trained with, if it had one."""
    note = json.loads((source / "template.json").read_text(encoding="utf-8"))
    if not note["chat_template"]:
        return None
    template = resolve_template(note["chat_template"], build_tokenizer(str(source)))
    return trained_with(template, note.get("parallel_tool_calls", "template"))  # older checkpoints have no such note


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The dtype in which the checkpoint holds its weights."""
    shard = sorted(checkpoint.glob("model-*.safetensors"))[0]
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def keys_of(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def compare_weights(checkpoint: Path, out: Path) -> None:
    """Every trained tensor, cast to the written dtype, equals the written one bit for bit.

    Raises:
        RuntimeError: a tensor is missing or differs; the conversion is then not published.
    """
    written = {key: shard for shard in out.glob("*.safetensors") for key in keys_of(shard)}
    for shard in sorted(checkpoint.glob("model-*.safetensors")):
        with safe_open(shard, framework="pt") as trained:
            for key in trained.keys():  # noqa: SIM118 - a safetensors file is no dict
                compare_tensor(key, trained.get_tensor(key), written)


def compare_tensor(key: str, trained: torch.Tensor, written: dict[str, Path]) -> None:
    """One tensor of the checkpoint against the written files, by name."""
    if key not in written:
        raise RuntimeError(f"{key} was trained but not written; the directory was not published")
    with safe_open(written[key], framework="pt") as file:
        exported = file.get_tensor(key)
    if not torch.equal(trained.to(exported.dtype), exported):
        raise RuntimeError(f"{key} differs from what was trained; the directory was not published")
