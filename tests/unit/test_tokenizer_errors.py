"""A tokenizer that cannot be right is refused with what came, what is allowed and what to do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from small_tokenizer import spare_piece, train_model, write_directory
from transformers import PreTrainedTokenizerFast

from tuner.errors import UserError
from tuner.model.internlm2.tokenization import InternLM2Tokenizer
from tuner.model.tokenizer import build_tokenizer

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "small")


def edit(directory: Path, decoder: dict[str, str] | None = None, **entries: Any) -> None:
    """Change tokenizer_config.json: `decoder` names more tokens, `entries` replace keys."""
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **entries}
    config["added_tokens_decoder"] |= {index: {"content": name, **FLAGS} for index, name in (decoder or {}).items()}
    path.write_text(json.dumps(config))


def other_family(directory: Path) -> Path:
    """A word-level tokenizer saved by transformers itself."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return directory


def test_internlm2_is_told_by_config_json_or_by_its_tokenizer(small: Path, tmp_path: Path):
    assert type(build_tokenizer(str(small))) is InternLM2Tokenizer
    (small / "config.json").unlink()
    assert type(build_tokenizer(str(small))) is InternLM2Tokenizer
    edit(small, tokenizer_class="PreTrainedTokenizerFast")  # as this project saves it
    assert type(build_tokenizer(str(small))) is InternLM2Tokenizer


def test_another_family_is_left_to_transformers(tmp_path: Path):
    tokenizer = build_tokenizer(str(other_family(tmp_path)))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert not isinstance(tokenizer, InternLM2Tokenizer)
    assert tokenizer("hello").input_ids == [0]


def test_the_demo_model_has_the_native_tokenizer():
    tokenizer = build_tokenizer("demo:model")
    assert type(tokenizer) is InternLM2Tokenizer
    assert tokenizer("<|im_start|>").input_ids == [1, len(tokenizer) - 1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "There is no directory ./nowhere"),
        ("nobody/nothing", "hub gave no model"),
        ("demo:x", "demo:model"),
    ],
)
def test_a_wrong_path_says_what_paths_are_allowed(path: str, message: str):
    with pytest.raises(UserError, match=message):
        build_tokenizer(path)


def test_a_directory_without_a_tokenizer_lists_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"Found: notes\.txt\. Needed: tokenizer\.json"):
        build_tokenizer(str(tmp_path))


def test_a_tokenizer_that_only_remote_code_can_run_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    with pytest.raises(UserError, match="remote code is never run"):
        build_tokenizer(str(tmp_path))


def test_internlm2_without_its_model_file_is_told_to_copy_it(small: Path):
    (small / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.model .* Copy it"):
        build_tokenizer(str(small))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:f868\nsize 1477754\n", "git lfs pull"),
        (lambda b: b[:5000], "cut short"),
        (lambda b: b"", "Download it again"),
        (lambda b: b"\x00" + b, "Download it again"),
        (lambda b: b"<html>not found</html>", "Download it again"),
    ],
)
def test_a_damaged_model_file_says_so(small: Path, damage: Any, message: str):
    path = small / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        build_tokenizer(str(small))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram", "user_defined_symbols": []}, r"model type unigram \(bpe\)"),
        ({"add_dummy_prefix": True}, r"add_dummy_prefix \(off\)"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalizer nmt_nfkc \(identity\)"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces \(off\)"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(small: Path, settings: dict[str, Any], message: str):
    (small / "tokenizer.model").write_bytes(train_model(**settings))
    with pytest.raises(UserError, match=message):
        build_tokenizer(str(small))


def test_a_user_defined_piece_that_no_merge_gives_must_be_named(small: Path):
    with (small / "tokenizer.model").open("ab") as file:
        file.write(spare_piece("hello"))
    with pytest.raises(UserError, match=r'"1010": \{"content": \'hello\', "special": false\}'):
        build_tokenizer(str(small))
    edit(small, {"1010": "hello"})
    assert build_tokenizer(str(small))("hello").input_ids == [1, 1010]


@pytest.mark.parametrize(
    ("decoder", "entries", "message"),
    [
        ({"1003": "¤"}, {}, "A name needs two characters"),
        ({"1003": "<s>"}, {}, "same text"),
        ({"1003": "[UNUSED_TOKEN_0]"}, {}, "same text"),
        ({"1012": "<img>"}, {}, r"\[1012\] beyond the 1,010 pieces"),
        ({}, {"additional_special_tokens": ["<|lost|>"]}, r"<\|lost\|> special but gives no id"),
        ({}, {"pad_token": "<pad>"}, "<pad> special but gives no id"),
    ],
)
def test_names_that_cannot_be_right_are_refused(small: Path, decoder: Any, entries: dict[str, Any], message: str):
    edit(small, decoder, **entries)
    with pytest.raises(UserError, match=message):
        build_tokenizer(str(small))


def test_tokens_beyond_the_model_follow_on_from_it(small: Path):
    edit(small, {"1010": "<img>", "1011": "</img>"})
    assert build_tokenizer(str(small))("<img></img>").input_ids == [1, 1010, 1011]


def test_a_config_that_is_not_json_names_the_file(small: Path):
    (small / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        build_tokenizer(str(small))
