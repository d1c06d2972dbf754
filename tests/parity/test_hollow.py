"""A model built without weights, which are then put in one by one, is the model that is loaded or drawn whole."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.model.build import build_llm
from tuner.model.hollow import BuiltWeights, StoredWeights, stored_names
from tuner.model.internlm2.configuration import InternLM2Config

SIZES = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "internlm2": lambda: InternLM2Config(**SIZES),
    "llama, tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, scaled": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters=SCALED | {"original_max_position_embeddings": 8192}
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8),  # a buffer that scales embeddings
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8),  # two sets of frequencies
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=2),  # experts are stored apart
}


def put_in(llm: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Each parameter and persistent buffer, and note where they came from."""
    assert {parameter.device.type for parameter in llm.parameters()} == {"meta"}
    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    kept = stored_names(llm)
    for name, meta in list(llm.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        if meta not in made:
            made[meta] = torch.nn.Parameter(weights[name].clone())
        setattr(llm.get_submodule(parent), leaf, made[meta])
    for name, _ in list(llm.named_buffers()):
        if name in kept:
            parent, _, leaf = name.rpartition(".")
            setattr(llm.get_submodule(parent), leaf, weights[name].clone())
    llm.source = type(weights)


@pytest.fixture(params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_its_logits_are_those_of_the_model_built_whole(directory: Path, weights: str):
    ids = torch.arange(24)[None]
    llms = [
        build_llm(str(directory), weights=weights, attention="eager", hold=hold, seed=3).eval()
        for hold in (None, put_in)
    ]
    whole, filled = (llm(ids).logits for llm in llms)
    assert torch.equal(whole, filled)
    is_stored = weights == "pretrained" and llms[1].config.model_type != "mixtral"
    assert llms[1].source is (StoredWeights if is_stored else BuiltWeights)
