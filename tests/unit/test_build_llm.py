"""build_llm: what it gives for the same words every time, and what it says when a model cannot be had."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config

import tuner.model.build as build_module
from tuner.errors import UserError
from tuner.model.attention import BACKENDS, attention_name, resolve_backend
from tuner.model.build import build_llm
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM
from tuner.model.internlm2.reward import InternLM2ForRewardModel
from tuner.model.memory import Memory

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """A saved tiny InternLM2 in bf16."""
    directory = tmp_path / "internlm2-tiny"
    InternLM2ForCausalLM(InternLM2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


def test_pretrained_weights_come_in_fp32_and_in_training_mode(model_directory: Path) -> None:
    llm = build_llm(str(model_directory))
    assert type(llm) is InternLM2ForCausalLM
    assert llm.training
    saved = load_file(model_directory / "model.safetensors")
    for name, tensor in llm.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name].float()), name
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.float32}


def test_random_weights_follow_the_seed_alone_and_leave_the_random_state(model_directory: Path) -> None:
    (model_directory / "model.safetensors").unlink()
    torch.manual_seed(1)
    first = build_llm(str(model_directory), weights="random", seed=5)
    torch.manual_seed(2)
    torch.rand(3)
    state = torch.get_rng_state()
    second = build_llm(str(model_directory), weights="random", seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(first, second)
    assert not same_weights(first, build_llm(str(model_directory), weights="random", seed=6))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert first.output.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.training


def test_random_ignores_weights_that_are_there(model_directory: Path) -> None:
    assert not same_weights(build_llm(str(model_directory)), build_llm(str(model_directory), weights="random"))


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_attention_is_the_one_asked_for(model_directory: Path, weights: Any) -> None:
    automatic = build_llm(str(model_directory), weights=weights)
    assert automatic.config._attn_implementation == attention_name(resolve_backend("auto"))
    assert build_llm(str(model_directory), weights=weights, attention="eager").config._attn_implementation == "eager"
    named = build_llm(str(model_directory), weights=weights, attention="sdpa")
    assert named.config._attn_implementation == attention_name("sdpa")
    assert automatic.config is not named.config
    with pytest.raises(UserError, match=f"attention='flush': choose 'auto', 'eager', .*{min(BACKENDS)}"):
        build_llm(str(model_directory), weights=weights, attention="flush")


def test_gradient_checkpointing_is_set_on_every_layer(model_directory: Path) -> None:
    llm = build_llm(str(model_directory), memory=Memory(gradient_checkpointing=True))
    assert all(layer.gradient_checkpointing for layer in llm.model.layers)
    assert not any(layer.gradient_checkpointing for layer in build_llm(str(model_directory)).model.layers)


def test_every_causal_lm_of_transformers_is_served(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    llm = build_llm(str(tmp_path), memory=Memory(gradient_checkpointing=True))
    assert type(llm) is LlamaForCausalLM
    assert llm.config._attn_implementation == attention_name(resolve_backend("auto"))
    assert llm.is_gradient_checkpointing


def test_sharded_weights_are_read(model_directory: Path) -> None:
    whole = build_llm(str(model_directory))
    (model_directory / "model.safetensors").unlink()
    whole.save_pretrained(model_directory, max_shard_size="10KB")
    assert not (model_directory / "model.safetensors").exists()
    assert same_weights(whole, build_llm(str(model_directory)))
    next(model_directory.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its \d+ weight files \(model-00002"):
        build_llm(str(model_directory))


def test_a_first_revision_that_says_internlm_is_read_as_internlm2(model_directory: Path) -> None:
    expected = build_llm(str(model_directory))
    auto_map = {"AutoConfig": "configuration_internlm.InternLMConfig"}
    edit_config(
        model_directory, model_type="internlm", auto_map=auto_map, rope_scaling={"type": "dynamic", "factor": 1}
    )
    llm = build_llm(str(model_directory))
    assert same_weights(llm, expected)
    assert llm.config.to_dict()["model_type"] == "internlm2"
    assert llm.config.rope_scaling == {"type": "dynamic", "factor": 1}
    assert build_llm(str(model_directory), weights="random").config.to_dict()["model_type"] == "internlm2"


def test_an_internlm_of_the_first_generation_is_refused(model_directory: Path) -> None:
    edit_config(model_directory, model_type="internlm", architectures=["InternLMForCausalLM"], auto_map={})
    with pytest.raises(UserError, match=r"no model type 'internlm'.*internlm2.*never run"):
        build_llm(str(model_directory))


def test_a_demo_path_is_resolved_first(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"demo:model": str(model_directory)}
    monkeypatch.setattr(build_module, "resolve", lambda path: made.get(path, path))
    assert isinstance(build_llm("demo:model", weights="random"), InternLM2ForCausalLM)
    (model_directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights='random'"):
        build_llm("demo:model")


def pickle_instead(directory: Path) -> None:
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    weights.unlink()


def truncate(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_a_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights.pop("output.weight")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def nest(directory: Path) -> None:
    inner = directory / "snapshot"
    inner.mkdir()
    (directory / "config.json").rename(inner / "config.json")


def make_reward(directory: Path) -> None:
    shutil.rmtree(directory)
    InternLM2ForRewardModel(InternLM2Config(**SHAPE)).save_pretrained(directory)


def make_t5(directory: Path) -> None:
    T5Config().save_pretrained(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MISTAKES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights.*weights='random'"),
    "only pickles": (pickle_instead, r"only as pickles \(pytorch_model.bin\).*\ntuner convert legacy .*--allow-"),
    "damaged weights": (truncate, "damaged"),
    "git-lfs pointer": (lambda d: (d / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "missing tensor": (drop_a_tensor, "output.weight is missing"),
    "other shape": (lambda d: edit_config(d, vocab_size=65), r"output.weight is \(64, 32\), not \(65, 32\)"),
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config.json"),
    "config one deeper": (nest, r"has no config.json.*Did you mean '.*snapshot'"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read.*JSON"),
    "config of another kind": (lambda d: (d / "config.json").write_text("[1]"), "holds a list"),
    "unknown type": (lambda d: edit_config(d, model_type="internlm4"), "no model type 'internlm4'.*internlm3"),
    "no type": (lambda d: edit_config(d, model_type=...), 'no "model_type"'),
    "wrong field": (lambda d: edit_config(d, hidden_size="wide"), "hidden_size"),
    "odd heads": (lambda d: edit_config(d, num_attention_heads=5), "hidden_size=32 does not divide by 5 heads"),
    "reward model": (make_reward, "InternLM2ForRewardModel, which is no causal.*AutoModelForSequence"),
    "no causal LM": (make_t5, "t5, which is no causal language model"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter.*base"),
    "broken index": (
        lambda d: (d / "model.safetensors").rename(d / "model.safetensors.index.json"),
        "is no index of weights",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_directory_is_named_with_its_remedy(model_directory: Path, mistake: str) -> None:
    spoil, message = MISTAKES[mistake]
    spoil(model_directory)
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_llm(str(model_directory))


def test_a_pickle_is_never_opened(model_directory: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "exploded"), "w")

    pickle_instead(model_directory)
    (model_directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="pickles"):
        build_llm(str(model_directory))
    with pytest.raises(UserError):  # the loader itself refuses too, were the check above to miss a name
        build_module._load(str(model_directory), build_module._read_config(str(model_directory)), "eager")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0}/internlm2-tinny", r"no model directory.*Did you mean .*internlm2-tiny"),
        ("{0}/elsewhere/internlm2-tiny", r"no model directory.*Of its path, '.*' exists"),
        ("./no/such/model", "no model directory './no/such/model'"),
        ("{0}/internlm2-tiny/config.json", "is a file. Give the directory"),
        ("internlm/internlm2-chat-7b", "the hub did not give it.*Check the name and the network"),
        ("internlm2_7b", "the hub did not give it"),
    ],
)
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_wrong_path_is_answered_with_what_is_near(
    model_directory: Path, path: str, message: str, weights: Any
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_llm(path.format(model_directory.parent), weights=weights)


def test_a_name_beside_the_working_directory_is_suggested(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_directory.parent)
    with pytest.raises(UserError, match="Did you mean internlm2-tiny"):
        build_llm("internlm2-tinny")
    assert isinstance(build_llm("internlm2-tiny", weights="random"), InternLM2ForCausalLM)


def test_weights_must_be_one_of_the_two_words(model_directory: Path) -> None:
    with pytest.raises(UserError, match="weights='scratch': choose 'pretrained' or 'random'"):
        build_llm(str(model_directory), weights="scratch")  # type: ignore[arg-type]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(build_module.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(build_module.urllib.request, "getproxies", dict)
    monkeypatch.setattr(build_module.socket, "getaddrinfo", fail)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_a_hub_name_fails_at_once() -> None:
    assert build_module._is_offline("internlm/internlm2-7b")
    with pytest.raises(UserError, match="the hub did not give it"):
        build_llm("internlm/internlm2-7b")


@pytest.mark.usefixtures("no_network")
def test_a_proxy_may_know_the_hub_where_we_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not build_module._is_offline("internlm/internlm2-7b")


def test_settings_of_memory_that_mean_nothing_or_do_not_go_together_are_refused(model_directory: Path) -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing=0\.5, tile_tokens=0: allowed are"):
        Memory(gradient_checkpointing=0.5, tile_tokens=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"gradient_checkpointing is False\. Set gradient_checkpointing = True"):
        Memory(offload_activations=True)
    with pytest.raises(UserError, match=r"this model has 'eager'\. Set attention = 'auto'"):
        build_llm(str(model_directory), attention="eager", memory=Memory("attention"))
