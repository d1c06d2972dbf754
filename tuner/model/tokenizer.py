"""Builds the tokenizer of any model directory; InternLM2's natively, others through transformers, never remote code."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tuner.demo.files import resolve
from tuner.errors import UserError
from tuner.model.internlm2.tokenization import CONFIG_FILE, MODEL_FILE, InternLM2Tokenizer, read_config

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab*"]
TOKENIZER_FILES += ["merges.txt", "*.model"]


def build_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the model at `path`: a directory, a name on the Hugging Face hub or `demo:model`.

    Raises:
        UserError: there is no such directory or name, it holds no tokenizer, or one that only remote code or slow
            Python code can run.
    """
    directory = _directory(path)
    config = read_config(directory)
    if _is_internlm2(directory, config):
        return InternLM2Tokenizer.from_pretrained(str(directory))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that transformers can load by itself (remote code is never run): {error}\n"
            f"Found: {_listing(directory)}. Needed: tokenizer.json and {CONFIG_FILE}, as beside the original model."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{directory} gives the slow tokenizer {type(tokenizer).__name__}; a fast one is needed. Add the "
            "tokenizer.json of the model."
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel) -> None:
    """Every id that the tokenizer can give must have a row in the embedding.

    Raises:
        UserError: an index error (or, on a GPU, a dead process) would say it later.
    """
    num_rows = llm.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_rows:
        raise UserError(
            f"The tokenizer has ids up to {largest}, the model's embedding only {num_rows} rows. "
            "Use the tokenizer that belongs to the model (tokenizer.path), or another model_path."
        )


def _directory(path: str) -> Path:
    """The local directory behind `path`; a hub name is downloaded, its tokenizer files only."""
    directory = Path(resolve(path)).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{path} is a file; give the model's directory.")
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"There is no directory {path}. Give a model directory, a hub name or demo:model.")
    try:
        return Path(snapshot_download(path, allow_patterns=TOKENIZER_FILES))
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"There is no directory {path}, and the hub gave no model of that name ({first_line}). Give the directory "
            "of a model, or download it first: hf download NAME --local-dir DIRECTORY"
        ) from error


def _is_internlm2(directory: Path, tokenizer_config: dict[str, object]) -> bool:
    """config.json decides; without one, the tokenizer's class or its chat tokens beside a tokenizer.model do."""
    if (directory / "config.json").is_file():
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{directory / 'config.json'} is not JSON ({error}). Download it again.") from error
        architectures = config.get("architectures") or []
        return config.get("model_type") == "internlm2" or any(name.startswith("InternLM2") for name in architectures)
    named = str(tokenizer_config.get("tokenizer_class", "")).startswith("InternLM2")
    chat_tokens = str(tokenizer_config.get("added_tokens_decoder", ""))
    published = "<|im_start|>" in chat_tokens and "<|action_start|>" in chat_tokens
    return (directory / MODEL_FILE).is_file() and (named or published)


def _listing(directory: Path) -> str:
    return ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "nothing"
