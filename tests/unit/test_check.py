"""All mistakes of a config are told at once, before anything is loaded."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tuner.check import RULES, check, warn_of_precision
from tuner.config import add_options, loads, render
from tuner.configs.optimizer_rules import wrong_in_backward
from tuner.errors import UserError
from tuner.model import build

RECIPE = "internlm2_7b-sft_full"


@pytest.fixture
def good(tmp_path: Path) -> dict[str, object]:
    """Settings with nothing wrong: a data file with a row, a model directory that is never opened."""
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "internlm2", "vocab_size": 100}', encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"not opened")
    return {"model_path": str(model), "data_path": str(tmp_path / "rows.jsonl"), "precision": "fp32"}


def problems(
    settings: dict[str, object], options: dict[str, object] | None = None, tail: str = "", recipe: str = RECIPE
) -> str:
    """The message of the check; empty where it finds nothing."""
    source = add_options(render(recipe, settings) + tail, options or {})
    try:
        check(loads(source))
    except UserError as error:
        return str(error)
    return ""


def test_a_right_config_passes_and_nothing_is_built(good: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert problems(good) == ""


def test_no_number_is_infinite() -> None:
    """An edited file can hold them, where NAME=VALUE cannot."""
    for name in ("lr", "weight_decay", "warmup_ratio"):
        assert RULES[name].holds(0.5)
        assert not any(RULES[name].holds(float(value)) for value in ("inf", "-inf", "nan"))


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("lr", 0.0, "a number above 0"),
        ("lr", -1e-5, "a number above 0"),
        ("max_length", 1, "a whole number from 2"),
        ("num_accumulation_steps", 0, "a whole number from 1"),
        ("num_epochs", 0, "a whole number from 1"),
        ("max_steps", 0, "a whole number from 1 or None"),
        ("warmup_ratio", 1.5, "a share from 0 to 1"),
        ("min_lr_ratio", -0.1, "a share from 0 to 1"),
        ("weight_decay", -0.1, "a number from 0"),
        ("max_grad_norm", 0.0, "a number above 0"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("betas", (0.9,), "two numbers from 0 to below 1"),
        ("seed", -1, "a whole number from 0"),
        ("log_interval", 0, "a whole number from 1"),
        ("save_interval", 0, "a whole number from 1 or None"),
        ("keep_checkpoints", 0, "a whole number from 1 or None"),
        ("keep_every", 0, "a whole number from 1 or None"),
        ("sample_interval", -1, "a whole number from 0"),
        ("precision", "bf61", "one of fp32, bf16, fp16. Did you mean bf16?"),
        ("attention", "flahs", "one of auto, eager, "),
        ("weights", "pretraind", "one of pretrained, random"),
        ("too_long", "trunkate", "one of truncate, split, drop"),
        ("on_bad_row", "ignore", "one of raise, skip"),
        ("gradient_checkpointing", -1, "True, False, every n-th layer, or 'attention'"),
        ("tile_tokens", 0, "a whole number from 1 or None"),
        ("data_format", "preference", "No method trains on preference pairs yet"),
        ("data_format", "no_such_module:to_sample", "such as my_rows:to_sample"),
        ("data_format", "json:lods", "json has no function 'lods'. Did you mean loads"),
        ("data_format", "alpacca", "or a function row -> sample. Did you mean alpaca?"),
        ("chat_template", "internlm", "internlm2"),
        ("loss_on", "call", "one of assistant, last, calls, thoughts. Did you mean calls?"),
    ],
)
def test_a_value_out_of_range_is_told_once(setting: str, value: object, allowed: str, good: dict[str, object]):
    message = problems({**good, setting: value})
    assert message.startswith(f"{setting} = {value!r}: ")
    assert allowed in message
    assert "\n" not in message


def test_settings_of_memory_that_do_not_go_together_are_told(good: dict[str, object]):
    message = problems({**good, "gradient_checkpointing": False, "offload_activations": True})
    assert "but gradient_checkpointing is False. Set gradient_checkpointing = True" in message
    message = problems({**good, "gradient_checkpointing": "attention", "attention": "eager"})
    assert "keeps the output of tuner's attention, and this model has 'eager'" in message


def test_what_an_optimizer_in_backward_cannot_do_is_told(good: dict[str, object]):
    right = {**good, "optimizer_in_backward": True, "max_grad_norm": None, "num_accumulation_steps": 1}
    assert problems(right) == ""
    wrong = {
        "max_grad_norm": (0.5, "max_grad_norm=0.5 scales a gradient by the norm of the whole"),
        "num_accumulation_steps": (4, "A step has 4 packs on a rank"),
        "precision": ("fp16", "precision='fp16' skips a step whose gradient overflows"),
        "stages": ([{"max_length": 8192, "share": 0.5}, {"max_length": 32768, "share": 0.5}], "A step has 4 packs"),
    }
    for setting, (value, text) in wrong.items():
        message = problems({**right, "max_steps": 9, setting: value})
        assert message.startswith(text), setting
        assert "optimizer_in_backward" in message
    assert wrong_in_backward({"optim_wrapper": {"in_backward": True}, "strategy": {"deepspeed": "zero3"}})[
        0
    ].startswith("deepspeed='zero3' has an optimizer of its own")


def test_all_mistakes_come_at_once(good: dict[str, object]):
    message = problems({**good, "lr": -1.0, "precision": "int8", "data_path": "no/such.jsonl", "model_path": "./none"})
    assert message.startswith("The config has 4 mistakes:\n")
    for part in (
        "lr = -1.0",
        "precision = 'int8'",
        "There is no data file no/such.jsonl",
        "no model directory './none'",
    ):
        assert message.count(part) == 1


def test_a_wrong_value_that_only_the_assembly_has_is_found(good: dict[str, object]):
    assert problems(good, {"optim_wrapper.optimizer.lr": "-1"}).startswith("optim_wrapper.optimizer.lr = -1.0: ")
    assert problems(good, {"optim_wrapper.clip_grad.max_norm": "0"}).startswith(
        "optim_wrapper.clip_grad.max_norm = 0.0: "
    )


def test_an_argument_that_a_type_does_not_know_is_told_with_the_nearest(good: dict[str, object]):
    message = problems(good, tail="\nstrategy['presicion'] = 'fp32'\nmodel['llm']['atention'] = 'auto'\n")
    assert "strategy: build_strategy has no argument presicion. Did you mean precision?" in message
    assert "model.llm: build_llm has no argument atention. Did you mean attention?" in message


def test_a_type_that_cannot_be_imported_is_one_of_the_mistakes(good: dict[str, object]):
    message = problems({**good, "lr": -1.0}, tail="\nfrom torch.optim import Adamm\nmodel['type'] = Adamm\n")
    assert "2 mistakes" in message
    assert "Failed to import Adamm from torch.optim in config.py, line" in message
    assert "lr = -1.0" in message


def test_a_missing_part_and_a_type_that_is_text_are_told(good: dict[str, object]):
    message = problems(good, tail="\ndel param_scheduler\ntrain_cfg = dict(type='TrainLoop')\n")
    assert "The config has no param_scheduler." in message
    assert "train_cfg.type is 'TrainLoop'; import a class" in message


def test_names_in_a_users_own_type_mean_what_the_user_means(good: dict[str, object]):
    tail = "\nfrom types import SimpleNamespace\nmine = dict(type=SimpleNamespace, weights=[1, 2], lr='any')\n"
    assert problems(good, tail=tail) == ""


@pytest.mark.parametrize("missing", ["no.jsonl", "no*.jsonl", "empty.jsonl", "."])
def test_data_that_is_missing_or_empty_is_told(missing: str, good: dict[str, object], tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    path = str(tmp_path / missing)
    assert path.rstrip("/.") in problems({**good, "data_path": path})
    message = problems({**good, "data_path": [path, str(tmp_path / "other.jsonl")]})
    assert "2 mistakes" in message


def test_demo_data_and_models_are_made_when_they_are_opened(tuner_cache: Path):
    check(loads(render("internlm2_tiny-sft_full", {})))
    assert not tuner_cache.exists()


def test_a_model_directory_without_config_or_weights_is_told(good: dict[str, object]):
    model = Path(str(good["model_path"]))
    (model / "model.safetensors").unlink()
    assert "has no weights" in problems(good)
    assert problems({**good, "weights": "random"}) == ""
    (model / "config.json").unlink()
    assert "has no config.json" in problems(good)


def test_a_name_on_the_hub_passes(good: dict[str, object]):
    assert problems({**good, "model_path": "internlm/internlm2-7b"}) == ""


@pytest.mark.parametrize(("largest", "fits"), [(99, True), (100, False)])
def test_a_tokenizer_larger_than_the_embedding_is_told(largest: int, fits: bool, good: dict[str, object]):
    added = {"2": {"content": "</s>"}, str(largest): {"content": "<|im_start|>"}}
    path = Path(str(good["model_path"])) / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    assert ("'<|im_start|>' with id 100" in problems(good)) == (not fits)


@pytest.mark.parametrize(
    ("precision", "has_cuda", "warned"),
    [("fp32", False, False), ("bf16", False, True), ("fp16", False, True), ("fp16", True, False)],
)
def test_a_precision_that_suits_the_device_badly_is_warned_of(
    precision: str, has_cuda: bool, warned: bool, caplog: Any
):
    with caplog.at_level(logging.WARNING, "tuner"):
        warn_of_precision(precision, has_cuda)
    assert bool(caplog.records) == warned


def test_a_format_that_an_entry_of_data_path_names_is_looked_at(good: dict[str, object]):
    entry = {"path": good["data_path"], "data_format": "sharegtp"}
    message = problems({**good, "data_path": [entry]})
    assert "data_format = 'sharegtp': allowed is one of" in message
    assert "Did you mean sharegpt" in message
    assert message.count("sharegtp") == 1


@pytest.mark.parametrize(
    ("sharing", "told"),
    [
        (16, ""),
        (3, "3 ranks cannot share 32 query heads and 8 kv heads. Sizes that can: 1, 2, 4, 8, 16, 32. For more ranks"),
        ({"ulysses": 3, "ring": 2}, "3 ranks cannot share"),
        ({"ulyses": 2}, "sequence_parallel_size = {'ulyses': 2} is not understood. Give a number of ranks from 1"),
        (0, "sequence_parallel_size = 0 is not understood"),
    ],
)
def test_ranks_that_cannot_share_the_heads_are_told(sharing: object, told: str, good: dict[str, object]):
    config = {"model_type": "internlm2", "vocab_size": 100, "num_attention_heads": 32, "num_key_value_heads": 8}
    (Path(str(good["model_path"])) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = problems(good | {"sequence_parallel_size": sharing})
    assert found.startswith(told) if told else not found


@pytest.mark.parametrize(
    ("strategy", "works"),
    [
        ({}, True),
        ({"deepspeed": "zero2"}, True),
        ({"deepspeed": "zero3", "quantise": None}, True),
        ({"deepspeed": "zero3"}, False),
        ({"deepspeed": "zero3_offload"}, False),
        ({"fsdp": "full"}, False),
    ],
)
def test_weights_of_4_bits_are_not_cut(strategy: dict[str, object], works: bool, good: dict[str, object]):
    found = problems(good | strategy, recipe="internlm2_7b-sft_qlora")
    assert found == "" if works else "quantise='nf4' (QLoRA) and " in found
    assert works or "Set quantise=None" in found


def test_an_adapter_takes_its_rotary_embedding_from_the_base(good: dict[str, object]):
    recipe = "internlm2_7b-sft_lora"
    assert problems(good, recipe=recipe) == ""
    turned = "\nfrom tuner.model.rope import Rope\nrope = dict(type=Rope, theta=1e6, scaling=None, length=8)\n"
    assert problems(good, recipe=recipe, tail=turned).startswith("rope_theta: an adapter is saved without a config")
    stages = [{"max_length": 4096, "share": 1.0, "rope_theta": 1e6}]
    assert "rope_theta: an adapter" in problems(good | {"stages": stages, "max_steps": 9}, recipe=recipe)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_variant": "dora", "deepspeed": "zero3"}, "leaves no rank a whole one. Set deepspeed='zero2'"),
        ({"lora_variant": "dora", "deepspeed": "zero2"}, ""),
        ({"optimizer": "adamw8bit", "deepspeed": "zero2"}, "deepspeed='zero2' cuts. Set optimizer='adamw'"),
        ({"optimizer": "adamw8bit", "fsdp": "full"}, "fsdp='full' cuts. Set optimizer='adamw'"),
        ({"optimizer": "adamw8bit"}, ""),
    ],
)
def test_an_adapter_and_its_optimizer_fit_the_strategy(settings: dict[str, object], told: str, good: dict[str, object]):
    found = problems(good | settings, recipe="internlm2_7b-sft_lora")
    assert told in found
    assert bool(told) == bool(found)
