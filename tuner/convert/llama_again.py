"""A model in the other form once more, by other code than that which writes it: what a fresh process compares with."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig

from tuner.convert.model_files import model_tensors
from tuner.convert.reload import Origin, rounding
from tuner.convert.shard import load, loaded_tensors
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.weights import merge_wqkv, split_wqkv

Tensors = Callable[[Path], Iterator[tuple[str, torch.Tensor]]]
COMPUTED = "rotary_emb.inv_freq"
INTERNLM2_TO_LLAMA = (
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".tok_embeddings.", ".embed_tokens."),
    ("output.", "lm_head."),
)


def origin_of(model: Path, tensors: Tensors) -> Origin:
    """The model directory as transformers loads it, and `tensors` of it, to compare its other form with."""
    stated = str(InternLM2Config.get_config_dict(model)[0].get("torch_dtype", "")).removeprefix("torch.")
    # three projections may sum in another order than the fused one
    return Origin(model, partial(tensors, model), partial(load, model), tolerance=rounding(stated))


def split_tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama's tensors of an InternLM2: read whole by safetensors, and split by the model's own code."""
    config = InternLM2Config.from_pretrained(model)
    assert config.num_key_value_heads is not None
    for name, tensor in loaded_tensors(model):
        if ".attention.wqkv." in name:
            parts = split_wqkv(tensor, num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim)
            for letter, part in zip("qkv", parts, strict=True):
                yield name.replace("attention.wqkv", f"self_attn.{letter}_proj"), part
        elif not name.endswith(COMPUTED):
            for ours, theirs in INTERNLM2_TO_LLAMA:
                name = name.replace(ours, theirs)
            yield name, tensor


def fused_tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """InternLM2's tensors of a Llama: read whole by safetensors, and fused by the model's own code."""
    head_dim = LlamaConfig.from_pretrained(model).head_dim
    assert head_dim is not None
    places = model_tensors(model)
    for name, tensor in loaded_tensors(model):
        if ".q_proj." in name:
            others = (name.replace("q_proj", letter) for letter in ("k_proj", "v_proj"))
            key, value = (read(places[other].path, other) for other in others)
            yield name.replace("self_attn.q_proj", "attention.wqkv"), merge_wqkv(tensor, key, value, head_dim=head_dim)
        elif not name.endswith(COMPUTED) and ".k_proj." not in name and ".v_proj." not in name:
            for ours, theirs in INTERNLM2_TO_LLAMA:
                name = name.replace(theirs, ours)
            yield name, tensor


def read(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
