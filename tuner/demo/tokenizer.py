"""A small sentencepiece tokenizer, built like InternLM2's own, from the demo's text."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

VOCAB_SIZE = 2560
SPECIAL_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
MAX_PIECE_LENGTH = 32  # characters
NUM_UNUSED = 9  # spare pieces [UNUSED_TOKEN_0..8] at the end; the last six carry the names above
FIRST_SPECIAL_ID = VOCAB_SIZE - len(SPECIAL_TOKENS)
USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    """A protobuf field; 2 = length-delimited (payload under 128 bytes), the rest as given."""
    key = bytes([number << 3 | wire_type])
    return key + bytes([len(payload)]) + payload if wire_type == 2 else key + payload


def _user_defined_piece(text: str) -> bytes:
    """One more piece for a serialised ModelProto: {1: {1: text, 2: score 0.0, 3: USER_DEFINED}}."""
    body = _field(1, 2, text.encode()) + _field(2, 5, bytes(4)) + _field(3, 0, bytes([USER_DEFINED]))
    return _field(1, 2, body)


def train_model(lines: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """tokenizer.model: unk, bos, eos, 256 bytes, pieces, and the spare pieces last, where InternLM2 has them.

    The trainer would put them first; repeated protobuf fields may simply be appended to a message.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - NUM_UNUSED,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=False,  # the text shows them in pairs, see files.py
        split_by_unicode_script=False,  # so that `{"city": "` may be one piece: fewer tokens, shorter training
        split_by_whitespace=False,
        max_sentencepiece_length=MAX_PIECE_LENGTH,
        num_threads=1,
        minloglevel=2,
    )
    spare = (_user_defined_piece(f"[UNUSED_TOKEN_{index}]") for index in range(NUM_UNUSED))
    return model.getvalue() + b"".join(spare)


def tokenizer_config(vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """tokenizer_config.json with the names of the special tokens, as on the hub."""
    named = {0: "<unk>", 1: "<s>", 2: "</s>"}
    named |= dict(enumerate(SPECIAL_TOKENS, start=vocab_size - len(SPECIAL_TOKENS)))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for index, token in named.items()},
        "additional_special_tokens": list(reversed(SPECIAL_TOKENS)),
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 1_000_000,
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }


def special_tokens_map() -> dict[str, Any]:
    """special_tokens_map.json."""
    return {
        "additional_special_tokens": list(reversed(SPECIAL_TOKENS)),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }


def write_tokenizer(lines: Iterable[str], directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """The three tokenizer files of a model directory."""
    (directory / "tokenizer.model").write_bytes(train_model(lines, vocab_size))
    for name, content in (
        ("tokenizer_config", tokenizer_config(vocab_size)),
        ("special_tokens_map", special_tokens_map()),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
