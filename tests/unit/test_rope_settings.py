"""Rotary settings of a run: what the model turns, what it says afterwards, and what is loaded from what it wrote."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizer import write_directory
from stub_training import make_runner, tiny_llm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from tuner.cli import run
from tuner.configs.rope_rules import warn_of_length
from tuner.convert.llama import convert_to_llama
from tuner.engine.checkpoint import list_checkpoints
from tuner.errors import UserError
from tuner.model.build import build_llm
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.rope import Rope, beyond_reach, own_rope, replace_rope, set_rope
from tuner.prove import rope as formulas

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
BASE, HEAD, LONG = 10000.0, 32, 256
CONFIGS = {
    "internlm2": lambda: InternLM2Config(**SHAPE, bias=False),
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
}


def of_kind(kind: str, base: float, **settings: Any) -> formulas.Rope:
    return formulas.Rope(kind, base, HEAD, 64, {"max_position_embeddings": 64, **settings})


# what is asked for, the formula, and the length of a document in it
ASKED: dict[str, tuple[Rope, formulas.Rope]] = {
    "base": (Rope(theta=1e6, length=LONG), of_kind("default", 1e6)),
    "linear": (Rope(scaling={"rope_type": "linear", "factor": 4}), of_kind("linear", BASE, factor=4)),
    "dynamic": (
        Rope(scaling={"rope_type": "dynamic", "factor": 2.0}, length=LONG),
        of_kind("dynamic", BASE, factor=2.0),
    ),
    "yarn": (
        Rope(theta=5e5, scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}),
        of_kind("yarn", 5e5, factor=4.0, beta_fast=16),
    ),
}


def build(family: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).eval()


def turned(llm: PreTrainedModel, length: int = LONG) -> np.ndarray:
    """(2, length, D / 2) cosines and sines."""
    [rotary] = [module for module in llm.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    pair = rotary(torch.zeros(1), torch.arange(length)[None])
    return np.stack([part[0, :, : HEAD // 2].double().numpy() for part in pair])


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ASKED)
def test_settings_turn_as_the_published_formula_and_so_does_what_is_loaded_again(
    kind: str, family: str, tmp_path: Path
) -> None:
    rope, formula = ASKED[kind]
    llm = build(family)
    plain = turned(llm)
    set_rope(llm, own_rope(llm.config), rope)
    angles, scale = formulas.turns(formula, np.arange(LONG), LONG)
    meant = scale * np.stack([np.cos(angles), np.sin(angles)])
    assert abs(turned(llm) - meant).max() < 2e-4
    assert abs(plain - meant).max() > 0.5
    assert np.array_equal(turned(llm, 10), turned(llm)[:, :10]), "not by the length of a batch"
    llm.save_pretrained(write_directory(tmp_path / "saved"))
    ids = torch.randint(1, 96, (1, LONG), generator=torch.Generator().manual_seed(1))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    logits = llm(ids).logits
    assert torch.equal(again(ids).logits, logits)
    assert (build(family)(ids).logits - logits).abs().max() > 1e-2
    assert beyond_reach(own_rope(again.config), LONG) is None
    if family == "internlm2":
        convert_to_llama(tmp_path / "saved", tmp_path / "llama", verify=False)
        llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
        assert (llama(ids).logits - logits).abs().max() < 1e-4
        assert llama.config.rope_parameters.items() >= again.config.rope_parameters.items()


def test_settings_can_change_and_change_back_in_place() -> None:
    """As at the border of two stages; what has the module's hooks keeps it."""
    llm = build("llama")
    own, before = own_rope(llm.config), turned(llm)
    rotary = llm.model.rotary_emb
    set_rope(llm, own, ASKED["yarn"][0])
    set_rope(llm, own, ASKED["base"][0])
    assert llm.model.rotary_emb is rotary
    fresh = build("llama")
    set_rope(fresh, own_rope(fresh.config), ASKED["base"][0])
    assert np.array_equal(turned(llm), turned(fresh))
    assert llm.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    set_rope(llm, own, Rope())
    assert np.array_equal(turned(llm), before)
    assert llm.config.max_position_embeddings == 64


def test_a_base_for_internlm2_that_was_dynamic_leaves_no_length_to_look_at() -> None:
    """Chat models were published so; documents up to the run's length then turn alike, whatever is beside them."""
    own = own_rope(InternLM2Config(**SHAPE, rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert "would turn each document" in str(beyond_reach(own, LONG))
    fixed = replace_rope(own, ASKED["dynamic"][0])
    assert fixed.parameters == {"rope_type": "default", "rope_theta": pytest.approx(BASE * 7 ** (32 / 30), rel=1e-15)}
    assert beyond_reach(fixed, LONG) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"theta": 0}, "a number above 1"),
        ({"theta": True}, "a number above 1"),
        ({"scaling": "yarn"}, "allowed is None, or"),
        ({"scaling": {"type": "yarn", "factor": 2}}, "allowed is None, or"),
        ({"scaling": {"rope_type": "llama3", "factor": 2}}, "linear or dynamic or yarn"),
        ({"scaling": {"rope_type": "yarn"}}, 'needs a "factor" of at least 1'),
        ({"scaling": {"rope_type": "linear", "factor": 0.5}}, 'needs a "factor" of at least 1'),
        ({"scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 1}}, "linear takes no 'beta_fast'"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2, "length": 1.5}}, "a whole number of tokens"),
    ],
)
def test_what_no_model_takes_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Rope(**settings)


def test_a_model_without_rotary_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="GPT2Config has no rotary embedding"):
        own_rope(GPT2Config())


def test_a_mistake_is_one_message_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "internlm2_tiny-sft_full", "rope_theta=-1", "rope_scaling={'rope_type': 'yarn'}"]) == 2
    told = capsys.readouterr().err
    assert told.count("rope_theta = -1.0: allowed is") == told.count('yarn needs a "factor"') == 1


def test_a_length_beyond_the_models_is_a_warning_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CONFIGS["internlm2"]().save_pretrained(tmp_path)
    config: dict[str, Any] = {
        "model": {"llm": {"type": build_llm, "path": str(tmp_path)}},
        "train_dataloader": {"dataset": {"max_length": LONG}},
    }
    with caplog.at_level(logging.WARNING, logger="tuner"):
        warn_of_length(config)
        warn_of_length(config | {"rope": {"type": Rope, "theta": 1e6, "scaling": None}})
        warn_of_length(config | {"rope": {"type": Rope, "theta": None, "scaling": {"rope_type": "yarn", "factor": 2}}})
    texts = [record.message for record in caplog.records]
    assert [text.split(" that")[0] for text in texts] == [
        "max_length = 256 is more than the 64 positions",
        "max_length = 256 is more than the 128 positions",
    ]
    assert '"yarn", "factor": 4}, or max_length = 64' in texts[0]


def test_each_stage_is_warned_of_by_its_own_length_and_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CONFIGS["internlm2"]().save_pretrained(tmp_path)
    stages: list[dict[str, Any]] = [
        {"max_length": 64, "share": 0.4},
        {"max_length": 128, "share": 0.2},
        {"max_length": 256, "share": 0.2, "rope_theta": 1e6},
        {"max_length": 256, "share": 0.1, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"max_length": 256, "share": 0.1, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
    ]
    config: dict[str, Any] = {
        "model": {"llm": {"type": build_llm, "path": str(tmp_path)}},
        "train_dataloader": {"dataset": {"max_length": LONG}, "stages": stages},
    }
    with caplog.at_level(logging.WARNING, logger="tuner"):
        warn_of_length(config)
    assert [record.message.split(" that")[0].split(". ")[0] for record in caplog.records] == [
        "stages[3] sets no rope_theta: after 1000000.0 in stages[2] it is the model's own again",
        "stages[1]: max_length = 128 is more than the 64 positions",
        "stages[4]: max_length = 256 is more than the 128 positions",
    ]


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    def runner(base: float, checkpoint: Path | None = None) -> Any:
        llm = tiny_llm()
        set_rope(llm, own_rope(llm.config), Rope(theta=base))
        return make_runner(tmp_path / "run", llm=llm, checkpoint=checkpoint)

    first = runner(1e6)
    assert b'"rope_theta": 1000000.0' in first.hf_files["hf/config.json"]
    first.train()
    with pytest.raises(UserError, match=r"rope_parameters was .*1000000\.0.* and is .*500000\.0"):
        runner(5e5, list_checkpoints(tmp_path / "run")[-1]).train()
