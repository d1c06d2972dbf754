"""FLOP counts against torch's own counter and against arithmetic by hand."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tuner.errors import UserError
from tuner.model.checkpointing import ATTENTION, enable_gradient_checkpointing
from tuner.model.flops import (
    attention_flops,
    count_matmuls,
    count_matmuls_of_config,
    hardware_flops,
    model_flops,
)
from tuner.model.internlm2.configuration import InternLM2Config

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDTH = 64  # heads x head size
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "internlm2": lambda: InternLM2Config(**SIZES, bias=False),
}


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_count_equals_what_torch_counts_in_a_real_step(family, checkpointing):
    """Torch counts both halves of the causal square, and no recomputed scores in eager attention.

    Early stopping would spare the last product of each layer, whose result the backward does not need.
    """
    tokens, layers = 64, SIZES["num_hidden_layers"]
    llm = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").train()
    if checkpointing:
        enable_gradient_checkpointing(llm, checkpointing)
    ids = torch.randint(0, 500, (1, tokens))
    with set_checkpoint_early_stop(False), FlopCounterMode(display=False) as counter:
        F.cross_entropy(llm(ids, use_cache=False).logits[0], ids[0]).backward()
    matmuls = count_matmuls(llm)
    half_forward = layers * 2 * WIDTH * tokens**2  # what causality leaves out
    ours = hardware_flops(matmuls, tokens, tokens**2, tokens, gradient_checkpointing=checkpointing)
    ours -= attention_flops(matmuls, tokens, tokens**2) / 2  # scores again, in flash backwards only
    ours += half_forward * {False: 3, True: 4, 2: 3 + 2 / 3}[checkpointing]
    assert ours == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_kept_attention_is_not_counted_again():
    matmuls = count_matmuls_of_config(CONFIGS["llama"]())
    counts = (matmuls, 64, 64**2, 64)
    every, kept = (hardware_flops(*counts, gradient_checkpointing=choice) for choice in (True, ATTENTION))
    assert every - kept == attention_flops(*counts[:3])
    assert kept - hardware_flops(*counts, gradient_checkpointing=False) == 2 * matmuls.layers * 64


def test_model_flops_by_hand():
    """6 per weight and token, the head for trained tokens only, 12 L h d sum(n^2) / 2 for causal attention."""
    matmuls = count_matmuls_of_config(CONFIGS["llama"]())
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # q, k and v (two of four heads), o, MLP
    assert (matmuls.layers, matmuls.head) == (3 * layer, 500 * 64)
    lengths = [10, 3, 50]
    squares = sum(length**2 for length in lengths)
    expected = 6 * (3 * layer * 63 + 500 * 64 * 20) + 6 * 3 * WIDTH * squares
    assert model_flops(matmuls, 63, squares, 20) == expected


def test_many_short_documents_cost_less_attention_than_one_long_one():
    matmuls = count_matmuls_of_config(CONFIGS["llama"]())
    assert attention_flops(matmuls, 64, 64 * 8 * 8) * 64 == attention_flops(matmuls, 64, 64 * 64 * 64)


def test_grouped_queries_save_projections_and_no_scores():
    full, grouped = (
        count_matmuls_of_config(transformers.LlamaConfig(**SIZES | {"num_key_value_heads": kv})) for kv in (4, 1)
    )
    assert full.attention == grouped.attention
    assert full.layers - grouped.layers == 3 * 2 * 64 * 48


def test_frozen_weights_cost_no_gradient_of_their_own():
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    whole = model_flops(count_matmuls(llm), 100, 0, 100)
    llm.requires_grad_(False)
    assert model_flops(count_matmuls(llm), 100, 0, 100) == pytest.approx(whole * 4 / 6)


def test_tied_embeddings_are_counted_once_as_the_head():
    tied, untied = count_matmuls_of_config(CONFIGS["llama-tied"]()), count_matmuls_of_config(CONFIGS["llama"]())
    assert tied == untied


def test_a_window_bounds_the_attention():
    config = transformers.MistralConfig(**SIZES, sliding_window=16)
    windowed, full = count_matmuls_of_config(config), count_matmuls_of_config(CONFIGS["llama"]())
    assert attention_flops(windowed, 1000, 1000**2) == attention_flops(full, 1000, 2 * 16 * 1000)
    assert attention_flops(windowed, 10, 100) == attention_flops(full, 10, 100)


def test_a_mixture_counts_the_experts_that_a_token_visits():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    matmuls = count_matmuls_of_config(config)
    attention = 64 * 64 * 2 + 2 * 64 * 32
    assert matmuls.layers == 3 * (attention + 2 * 3 * 64 * 96 + 8 * 64)


def test_layers_of_unknown_cost_are_refused():
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="no MFU"):
        count_matmuls_of_config(config)
