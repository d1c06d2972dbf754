"""Tokenizer and stop tokens of a model that takes another form: files that AutoTokenizer reads without us."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tuner.convert.settings import write_json
from tuner.dataset.templates import CHAT_TEMPLATES
from tuner.errors import UserError
from tuner.model.internlm2.tokenization import CONFIG_FILE, MODEL_FILE, PORTABLE_CLASS, InternLM2Tokenizer
from tuner.model.tokenizer import build_tokenizer

GENERATION = "generation_config.json"
TEXTS = (" a  b\n", "don't 12345", "你好，世界 🙂", "<s>x<|im_start|>user\n</s>")


def write_llama_companions(model: Path, out: Path) -> None:
    """Tokenizer, chat template and generation_config.json of `model`, none of which names remote code.

    Raises:
        UserError: it has no tokenizer, or none that needs no code of its own.
    """
    tokenizer = build_tokenizer(str(model))
    tokenizer.save_pretrained(out)
    path = out / CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.pop("auto_map", None):
        for code in out.glob("tokenization_*.py"):
            code.unlink()
        settings["tokenizer_class"] = PORTABLE_CLASS
        write_json(path, settings)
    write_json(out / GENERATION, generation_settings(model, tokenizer))


def write_internlm2_companions(model: Path, out: Path) -> None:
    """The same for an InternLM2, whose tokenizer is made from tokenizer.model.

    Raises:
        UserError: there is none, or it is not InternLM2's kind: its ids would not be those of `model`.
    """
    before = build_tokenizer(str(model))
    if not (model / MODEL_FILE).is_file():
        raise UserError(f"{model} has no {MODEL_FILE}, from which InternLM2's tokenizer is made. Add the model's.")
    tokenizer = InternLM2Tokenizer.from_pretrained(str(model))
    wrong = [text for text in TEXTS if before(text)["input_ids"] != tokenizer(text)["input_ids"]]
    if wrong:
        raise UserError(
            f"The tokenizer of {model} is none of InternLM2's kind: as one it gives other ids for {wrong[0]!r}."
        )
    tokenizer.save_pretrained(out)
    write_json(out / GENERATION, generation_settings(model, tokenizer))


def generation_settings(model: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """generation_config.json with all tokens that end an answer: those it had, and those of the chat's turns."""
    path = model / GENERATION
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Copy it again, or remove it.") from error
    stated = settings.get("eos_token_id")
    stops = stated if isinstance(stated, list) else [stated]
    stops += tokenizer.convert_tokens_to_ids([token for token in turn_ends(tokenizer) if token])
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kept = {key: value for key, value in settings.items() if key not in ("_from_model_config", "transformers_version")}
    return {**kept, **ids, "eos_token_id": [stop for stop in dict.fromkeys(stops) if stop is not None]}


def turn_ends(tokenizer: PreTrainedTokenizerFast) -> list[str | None]:
    """The end of a text, and the marks by which the known templates end a turn, where this tokenizer has them."""
    special, template = set(tokenizer.all_special_tokens), str(tokenizer.chat_template or "")
    ends = [token for known in CHAT_TEMPLATES.values() for token in known.stop_tokens]
    return [tokenizer.eos_token, *(token for token in ends if token in special and token in template)]
