"""All of a model directory but its weights: config, stop tokens, tokenizer and chat template, from a checkpoint's."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tuner.convert.checkpoint_files import companions
from tuner.dataset.jinja_template import resolve_template
from tuner.dataset.templates import ChatTemplate, trained_with
from tuner.model.tokenizer import build_tokenizer


@contextmanager
def linked(files: Iterable[Path]) -> Iterator[Path]:
    """A directory with links to these files and nothing else: what lies beside them is not read."""
    with tempfile.TemporaryDirectory() as name:
        for path in files:
            (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


def write_settings(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """All of a model directory but its weights; no model is built."""
    with linked(companions(checkpoint)) as source:
        write_config(source, out, dtype)
        write_tokenizer(source, out)
        for path in source.glob("*.py"):
            shutil.copyfile(path, out / path.name)  # for loaders that need the published code; never run here


def write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """config.json with the written dtype; an `auto_map` to files that nobody has would only mislead."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config.pop("_name_or_path", None)
    if not list(source.glob("*.py")):
        config.pop("auto_map", None)
    write_json(out / "config.json", config)


def write_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files, with a chat template that renders the ids of training, and the stop tokens of both."""
    tokenizer = build_tokenizer(str(source))
    template = read_template(source, tokenizer)
    write_generation_config(source, out, tokenizer, template)
    if template:
        tokenizer.chat_template = template.jinja
        shutil.copy(source / "template.json", out / "template.json")
    tokenizer.save_pretrained(out)


def read_template(source: Path, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The chat template that the run was trained with, if it had one."""
    note = json.loads((source / "template.json").read_text(encoding="utf-8"))
    if not note["chat_template"]:
        return None
    return trained_with(resolve_template(note["chat_template"], tokenizer), note.get("parallel_tool_calls", "template"))


def write_generation_config(
    source: Path, out: Path, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None
) -> None:
    """generation_config.json with the stop tokens of the chat template beside the tokenizer's own."""
    stops = [tokenizer.eos_token, *(template.stop_tokens if template else ())]
    names = [token for token in dict.fromkeys(stops) if token is not None]
    path = source / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored.pop("_from_model_config", None)
    stored |= {"eos_token_id": tokenizer.convert_tokens_to_ids(names), "bos_token_id": tokenizer.bos_token_id}
    write_json(out / "generation_config.json", {**stored, "pad_token_id": tokenizer.pad_token_id})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As transformers writes its settings."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
