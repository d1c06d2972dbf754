"""What is asked of a model between two steps leaves nothing behind."""

import random

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.engine.aside import aside


def small_llama() -> LlamaForCausalLM:
    """With dropout, and a rotary embedding that remembers the longest sequence it has seen."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=50, attention_dropout=0.5, max_position_embeddings=16, rope_parameters=rope,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_modes_random_states_angles_and_gradients_are_as_they_were():
    runs = []
    for asks in (False, True):
        llm = small_llama().train()
        llm.model.layers[0].eval()  # as an adapter keeps what it froze
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        ids = torch.arange(24)[None]  # beyond the 16 positions: angles depend on what came before
        llm(ids).logits.sum().backward()
        if asks:
            with aside(llm):
                assert not torch.is_grad_enabled()
                assert not any(module.training for module in llm.modules())
                drawn()
                llm(torch.arange(40)[None])
        modes = [module.training for module in llm.modules()]
        gradients = [parameter.grad.clone() for parameter in llm.parameters()]
        logits = llm(ids).logits
        assert logits.requires_grad
        runs.append((modes, gradients, logits.detach(), drawn()))
    (modes, gradients, logits, numbers), other = runs
    assert other[0] == modes
    assert modes.count(True) > 5
    assert False in modes
    assert all(torch.equal(one, two) for one, two in zip(gradients, other[1], strict=True))
    assert torch.equal(logits, other[2])
    assert numbers == other[3]
