"""What InternLM2Tokenizer reads, writes and caches, and how it behaves once loaded."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_tokenizer import AUTO_MAP, SPECIALS, TEMPLATE, write_directory

from tuner.model.internlm2 import fast_form
from tuner.model.internlm2.tokenization import InternLM2Tokenizer

TEXT = "  <|im_start|>user\n你好 ba shi 3.14\t——<|im_end|>\n"
FILES = ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("small"))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def edit_config(directory: Path, **entries: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_bos_goes_in_front_and_padding_is_eos_on_the_right(small: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(small)
    batch = tokenizer(["一", "一 ba ba ba"], padding=True)
    assert [ids[0] for ids in batch.input_ids] == [1, 1]
    assert batch.input_ids[0][-1] == tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert batch.attention_mask[0][-1] == 0
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == tokenizer(TEXT).input_ids[1:]
    assert len(tokenizer) == tokenizer.vocab_size == 1010


def test_the_stored_chat_template_renders_each_special_token_as_its_id(small: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(small)
    messages = [{"role": "user", "content": "你好"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [i for i in ids if i < 3 or i > 1003] == [1, 1009, 1008, 1009]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n你好\nassistant\n"


def test_a_saved_tokenizer_loads_and_saves_to_the_same_bytes(small: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer = InternLM2Tokenizer.from_pretrained(small)
    tokenizer("ba", truncation=True, max_length=1, padding="max_length")  # settings of a call leave no trace
    written = tokenizer.save_pretrained(first)
    again = InternLM2Tokenizer.from_pretrained(first)
    again.save_pretrained(second)
    assert content(first) == content(second)
    assert sorted(Path(path).name for path in written) == sorted(content(first)) == FILES
    assert content(first)["tokenizer.model"] == (small / "tokenizer.model").read_bytes()
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.chat_template == TEMPLATE


def test_the_saved_json_has_only_what_tokenizers_0_15_knows(small: Path, tmp_path: Path):
    InternLM2Tokenizer.from_pretrained(small).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    parts = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"]
    assert sorted(document) == sorted(["version", "truncation", "padding", *parts])
    names = "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback vocab merges"
    assert sorted(document["model"]) == sorted(["type", *names.split()])
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in document["model"]["merges"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the one class that every transformers has
    assert config["chat_template"] == TEMPLATE
    assert config["added_tokens_decoder"]["1009"]["content"] == "<|im_start|>"


def test_without_its_code_no_auto_map_is_saved(small: Path, tmp_path: Path):
    InternLM2Tokenizer.from_pretrained(small).save_pretrained(tmp_path)
    assert b"auto_map" not in (tmp_path / "tokenizer_config.json").read_bytes()


def test_code_beside_the_model_is_copied_and_its_auto_map_kept(small: Path, tmp_path: Path):
    source, first, second = tmp_path / "source", tmp_path / "first", tmp_path / "second"
    write_directory(source)
    for name in ("tokenization_internlm2.py", "tokenization_internlm2_fast.py"):
        (source / name).write_text(f"# {name}\nraise SystemExit('remote code ran')\n")
    InternLM2Tokenizer.from_pretrained(source).save_pretrained(first)
    InternLM2Tokenizer.from_pretrained(first).save_pretrained(second)
    assert content(first) == content(second)
    assert (first / "tokenization_internlm2_fast.py").read_text().startswith("# tokenization_internlm2_fast.py")
    config = json.loads((first / "tokenizer_config.json").read_text())
    assert (config["auto_map"], config["tokenizer_class"]) == (AUTO_MAP, "InternLM2Tokenizer")


def test_the_published_keys_come_back_unchanged(shared_data: Path, tmp_path: Path):
    hub = shared_data / "internlm2-7b-hub"
    tokenizer = InternLM2Tokenizer.from_pretrained(hub)
    tokenizer.save_pretrained(tmp_path)
    published = json.loads((hub / "tokenizer_config.json").read_text())
    del published["auto_map"]
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved == {**published, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == json.loads(
        (hub / "special_tokens_map.json").read_text()
    )
    assert len(tokenizer) == 92544


def test_names_fall_back_to_the_published_ones(shared_data: Path, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes((shared_data / "internlm2-7b-hub/tokenizer.model").read_bytes())
    tokenizer = InternLM2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(SPECIALS) == list(range(92538, 92544))
    assert tokenizer("<|im_start|>").input_ids == [1, 92543]


def test_a_chat_template_left_by_another_library_does_not_win(small: Path, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("stale")
    InternLM2Tokenizer.from_pretrained(small).save_pretrained(tmp_path)
    assert InternLM2Tokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_settings_survive_saving(small: Path, tmp_path: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(small, add_bos_token=False, add_eos_token=True, padding_side="left")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    again = InternLM2Tokenizer.from_pretrained(tmp_path)
    assert again("ba").input_ids == tokenizer("ba").input_ids
    assert again("ba").input_ids[0] != 1
    assert again("ba").input_ids[-1] == 2
    assert (again.padding_side, again.chat_template) == ("left", "{{ messages }}")
    assert InternLM2Tokenizer.from_pretrained(tmp_path, add_bos_token=True)("ba").input_ids[0] == 1


def test_tokens_that_are_added_survive_saving_with_their_ids(small: Path, tmp_path: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(small)
    assert tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True) == 2
    tokenizer.save_pretrained(tmp_path)
    again = InternLM2Tokenizer.from_pretrained(tmp_path)
    assert again("ba<img></img>").input_ids == tokenizer("ba<img></img>").input_ids
    assert again.convert_tokens_to_ids(["<img>", "</img>"]) == [1010, 1011]


def test_copies_and_pickles_encode_alike(small: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(small)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other(TEXT) == tokenizer(TEXT)


def test_the_second_load_comes_from_the_cache(small: Path, tuner_cache: Path, monkeypatch: pytest.MonkeyPatch):
    expected = InternLM2Tokenizer.from_pretrained(small)(TEXT)
    (entry,) = (tuner_cache / "tokenizers").iterdir()
    monkeypatch.setattr(fast_form, "parse", None)  # a call would fail
    assert InternLM2Tokenizer.from_pretrained(small)(TEXT) == expected
    assert list((tuner_cache / "tokenizers").iterdir()) == [entry]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"ba", b"xy", 1)])
def test_a_damaged_cache_entry_is_rebuilt(small: Path, tuner_cache: Path, damage: Any):
    expected = InternLM2Tokenizer.from_pretrained(small)(TEXT)
    (entry,) = (tuner_cache / "tokenizers").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert InternLM2Tokenizer.from_pretrained(small)(TEXT) == expected
    assert entry.read_bytes() == whole


def test_other_names_have_another_cache_entry(small: Path, tuner_cache: Path, tmp_path: Path):
    InternLM2Tokenizer.from_pretrained(small)
    other = write_directory(tmp_path / "other")
    decoder = json.loads((other / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder["1009"]["content"] = "<|start|>"
    names = ["<|start|>", *SPECIALS[:-1]]
    edit_config(other, added_tokens_decoder=decoder, additional_special_tokens=names)
    assert InternLM2Tokenizer.from_pretrained(other)("<|start|>").input_ids == [1, 1009]
    assert len(list((tuner_cache / "tokenizers").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_only_a_warning(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        tokenizer = InternLM2Tokenizer.from_pretrained(small)
    assert tokenizer("<|im_start|>").input_ids == [1, 1009]
    assert "TUNER_CACHE" in caplog.text


def test_a_full_disk_leaves_no_half_entry(small: Path, tuner_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(fast_form.os, "replace", full)
    assert InternLM2Tokenizer.from_pretrained(small)("<|im_start|>").input_ids == [1, 1009]
    assert list((tuner_cache / "tokenizers").iterdir()) == []


def test_auto_tokenizer_takes_ours_and_never_runs_the_code_beside_it(tmp_path: Path):
    poisoned, saved = write_directory(tmp_path / "poisoned"), tmp_path / "saved"
    marker = tmp_path / "remote-code-ran"
    for name in ("tokenization_internlm2.py", "tokenization_internlm2_fast.py", "configuration_internlm2.py"):
        (poisoned / name).write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit('remote code ran')\n")
    InternLM2Tokenizer.from_pretrained(write_directory(saved)).save_pretrained(saved)  # takes its auto_map away
    program = f"""
import tuner.model
from transformers import AutoTokenizer
for path in ({str(poisoned)!r}, {str(saved)!r}):
    for trust in ({{}}, {{"trust_remote_code": False}}, {{"trust_remote_code": True}}, {{"use_fast": False}}):
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
        print(type(tokenizer).__name__, tokenizer("<|im_start|>").input_ids, len(tokenizer))
"""
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    assert ran.stdout.splitlines() == ["InternLM2Tokenizer [1, 1009] 1010"] * 8, ran.stderr
    assert not marker.exists()
    assert "custom code" not in ran.stderr
