"""InternLM2 on disk: what is read, what is written, and that no remote code ever runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import tuner.model  # noqa: F401  # registers InternLM2
from tuner.errors import UserError
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM, InternLM2Model
from tuner.model.internlm2.reward import InternLM2ForRewardModel

AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
PUBLISHED = {  # a config.json as released, at a tiny size
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": AUTO_MAP,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.37.1",
    "use_cache": True,
    "vocab_size": 96,
}
KEYS = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
KEYS = [f"{key}.weight" for key in [*KEYS, "attention_norm", "ffn_norm"]]


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture
def hub_directory(tmp_path: Path) -> Path:
    """A directory as on the hub, except that its remote code betrays itself when run."""
    directory = tmp_path / "hub"
    InternLM2ForCausalLM(InternLM2Config.from_dict(PUBLISHED)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    (directory / "generation_config.json").unlink()
    poison = f"open({str(tmp_path / 'poisoned')!r}, 'w').close()\nraise SystemExit('remote code ran')\n"
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        (directory / name).write_text(poison, encoding="utf-8")
    return directory


def test_class_defaults_are_the_published_ones() -> None:
    written = InternLM2Config().to_dict()
    published = {
        "vocab_size": 103168,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "bias": True,
        "rope_theta": 10000,
        "rope_scaling": None,
        "attn_implementation": "eager",
    }
    assert {key: written[key] for key in published} == published
    assert "rope_parameters" not in written
    assert "reward_token_id" not in written


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000, None),
        ({"rope_theta": 1000000, "rope_scaling": None}, 1000000, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, 10000, {"type": "dynamic", "factor": 1.0}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 3}}, 10000, {"type": "linear", "factor": 3}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e7}}, 5e7, None),
        ({"rope_parameters": {"rope_theta": 5e7}}, 5e7, None),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e7}},
            5e7,
            {"type": "dynamic", "factor": 2.5},
        ),
        (
            {"rope_theta": 5e7, "rope_parameters": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.5}},
            5e7,
            {"type": "dynamic", "factor": 2.5},
        ),
    ],
)
def test_every_spelling_of_rope_is_read_and_the_published_one_written(
    tmp_path: Path, given: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    before = json.dumps(given)
    InternLM2Config(**given).save_pretrained(tmp_path)
    assert json.dumps(given) == before
    written = read_config(tmp_path)
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in written
    again = InternLM2Config.from_pretrained(tmp_path)
    assert (again.rope_theta, again.rope_scaling) == (theta, scaling)
    assert again.rope_parameters["rope_type"] == (scaling["type"] if scaling else "default")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "'llama3'.*linear, dynamic, yarn"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor=None must be"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor=0.5 must be"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor='2' must be"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta": 1}}, "has beta"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "two types"),
        ({"rope_theta": 1, "rope_parameters": {"rope_theta": 2}}, "rope_theta twice"),
        ({"rope_theta": 0}, "rope_theta=0 must be"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "hidden_size=100 does not divide by 8 heads"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "do not divide by num_key_value_heads=5"),
        ({"hidden_size": 96, "num_attention_heads": 32}, "a head of 3 is odd"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"hidden_act": "silly"}, "hidden_act='silly'"),
        ({"head_dim": 64}, "head_dim=64.*= 128"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InternLM2Config(**given)


def test_rope_can_be_overridden_when_loading(hub_directory: Path) -> None:
    config = AutoConfig.from_pretrained(hub_directory, rope_theta=5e7, rope_scaling={"type": "linear", "factor": 4.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e7}


def test_config_keeps_every_published_key_and_saves_the_same_bytes_again(tmp_path: Path, hub_directory: Path) -> None:
    check_round_trip(hub_directory, tmp_path)


@pytest.mark.parametrize("name", ["internlm2-7b-hub", "internlm2-tiny-golden"])
def test_real_config_keeps_every_published_key(tmp_path: Path, shared_data: Path, name: str) -> None:
    check_round_trip(shared_data / name, tmp_path)


def check_round_trip(source: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(source).save_pretrained(tmp_path / "first")
    AutoConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    original, written = read_config(source), read_config(tmp_path / "first")
    for config in (original, written):
        config.pop("transformers_version")
    assert written == original


def test_model_saved_and_loaded_again_gives_the_same_bytes(tmp_path: Path, hub_directory: Path) -> None:
    AutoModelForCausalLM.from_pretrained(hub_directory).save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    assert hashes(tmp_path / "first")["model.safetensors"] == hashes(hub_directory)["model.safetensors"]
    written = read_config(tmp_path / "first")
    assert written | {"transformers_version": "4.37.1"} == PUBLISHED


def test_golden_weights_saved_again_are_the_same_file(tmp_path: Path, shared_data: Path) -> None:
    golden = shared_data / "internlm2-tiny-golden"
    AutoModelForCausalLM.from_pretrained(golden).save_pretrained(tmp_path)
    original, written = load_file(golden / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    assert hashes(golden)["model.safetensors"] == hashes(tmp_path)["model.safetensors"]


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_have_the_published_names_in_the_published_order(bias: bool) -> None:
    llm = InternLM2ForCausalLM(InternLM2Config.from_dict(PUBLISHED | {"bias": bias}))
    layers = [f"model.layers.{layer}.{key}" for layer in (0, 1) for key in KEYS]
    if bias:
        layers = [
            name for key in layers for name in ([key, key.replace("weight", "bias")] if ".attention." in key else [key])
        ]
    assert list(llm.state_dict()) == ["model.tok_embeddings.weight", *layers, "model.norm.weight", "output.weight"]


def test_buffers_of_old_checkpoints_are_ignored(hub_directory: Path) -> None:
    weights = load_file(hub_directory / "model.safetensors")
    weights["model.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, hub_directory / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForCausalLM.from_pretrained(hub_directory, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]


def test_the_published_note_on_attention_does_not_choose_ours(hub_directory: Path, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(hub_directory)
    assert llm.config._attn_implementation == "sdpa"
    llm = AutoModelForCausalLM.from_pretrained(hub_directory, attn_implementation="eager")
    assert llm.config._attn_implementation == "eager"
    (hub_directory / "config.json").write_text(json.dumps(PUBLISHED | {"attn_implementation": "flash_attention_2"}))
    config = AutoConfig.from_pretrained(hub_directory)
    assert config._attn_implementation is None
    config.save_pretrained(tmp_path / "kept")
    assert read_config(tmp_path / "kept")["attn_implementation"] == "flash_attention_2"


def test_a_hub_directory_loads_ours_without_running_its_code_or_asking(hub_directory: Path, tmp_path: Path) -> None:
    """Even where the caller trusts remote code: the native class is there, so nothing needs trusting."""
    script = (
        "import sys, tuner.model, transformers as t\n"
        "for trust in ({}, {'trust_remote_code': True}):\n"
        "    for auto in (t.AutoConfig, t.AutoModel, t.AutoModelForCausalLM):\n"
        "        loaded = auto.from_pretrained(sys.argv[1], **trust)\n"
        "        print(type(loaded).__module__, type(loaded).__name__)\n"
        "        made = auto.from_config(loaded.config, **trust) if auto is not t.AutoConfig else loaded\n"
        "        assert type(made) is type(loaded)\n"
    )
    command = [sys.executable, "-c", script, str(hub_directory)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "poisoned").exists()
    causal_lm = ["tuner.model.internlm2.modeling", "InternLM2ForCausalLM"]
    assert result.stdout.split() == 2 * [
        "tuner.model.internlm2.configuration",
        "InternLM2Config",
        *causal_lm,
        *causal_lm,
    ]


def test_the_poison_of_the_test_above_works(hub_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="remote code ran"):
        exec((hub_directory / "modeling_internlm2.py").read_text(encoding="utf-8"))
    assert (tmp_path / "poisoned").exists()


def test_auto_model_goes_by_the_architecture(tmp_path: Path) -> None:
    for kind in (InternLM2ForCausalLM, InternLM2Model, InternLM2ForRewardModel):
        kind(InternLM2Config.from_dict(PUBLISHED)).save_pretrained(tmp_path / kind.__name__)
        assert type(AutoModel.from_pretrained(tmp_path / kind.__name__)) is kind
    _, report = AutoModel.from_pretrained(tmp_path / "InternLM2Model", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_reward_model_round_trips_with_its_published_names(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel", "AutoConfig": AUTO_MAP["AutoConfig"]}
    published = PUBLISHED | {"architectures": ["InternLM2ForRewardModel"], "auto_map": auto_map, "reward_token_id": 90}
    reward = InternLM2ForRewardModel(InternLM2Config.from_dict(published))
    reward.save_pretrained(tmp_path / "first")
    assert read_config(tmp_path / "first") | {"transformers_version": "4.37.1"} == published
    written = load_file(tmp_path / "first" / "model.safetensors")
    assert written["v_head.weight"].shape == (1, 32)
    assert set(written) - {"v_head.weight"} == {f"model.{name}" for name in reward.model.state_dict()}
    for auto in (AutoModelForSequenceClassification, AutoModel):
        again, report = auto.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert type(again) is InternLM2ForRewardModel
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        again.save_pretrained(tmp_path / "second")
        assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
        shutil.rmtree(tmp_path / "second")


def test_reward_token_defaults_to_the_published_one() -> None:
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    assert InternLM2ForRewardModel(InternLM2Config(**small)).config.reward_token_id == 92527


@pytest.mark.parametrize("side", ["left", "right", "none", "packed"])
@torch.no_grad()
def test_the_score_is_read_at_the_last_attended_position(side: str) -> None:
    torch.manual_seed(0)
    reward = InternLM2ForRewardModel(InternLM2Config.from_dict(PUBLISHED)).eval()
    torch.nn.init.normal_(reward.v_head.weight)
    rows = [torch.randint(3, 96, (length,)) for length in ((7, 7) if side == "none" else (7, 4))]
    hidden = [reward.model(row[None]).last_hidden_state[0, -1] for row in rows]
    expected = torch.stack(hidden) @ reward.v_head.weight.T
    pads = [torch.full((7 - len(row),), 2) for row in rows]
    if side == "packed":
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        scores = reward(
            torch.cat(rows)[None], position_ids=positions, cu_seqlens=torch.tensor([0, 7, 11]), max_seqlen=7
        ).logits
    elif side == "none":
        scores = reward(torch.stack(rows)).logits
    else:
        pairs = list(zip(pads, rows, strict=True)) if side == "left" else list(zip(rows, pads, strict=True))
        ids = torch.stack([torch.cat(pair) for pair in pairs])
        real = [
            [torch.zeros_like(part) if part is pad else torch.ones_like(part) for part in pair]
            for pair, pad in zip(pairs, pads, strict=True)
        ]
        mask = torch.stack([torch.cat(row) for row in real])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scores = reward(ids, attention_mask=mask, position_ids=positions).logits
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
