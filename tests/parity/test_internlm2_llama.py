"""Our InternLM2 against transformers' Llama with the fused projection split: another code for the same function."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.model.attention import attention_name
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM
from tuner.model.internlm2.weights import merge_wqkv, split_wqkv

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "bias": False,
    "pad_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "mqa": {"num_key_value_heads": 1},
    "bias": {"bias": True},
    "bias mha": {"bias": True, "num_key_value_heads": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, factor 1": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}, "rope_theta": 1000000},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
}
SHORT, LONG = 24, 80  # tokens: within and beyond max_position_embeddings
RENAMED = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
}


def our_model(attention: str = "sdpa", **overrides: Any) -> InternLM2ForCausalLM:
    torch.manual_seed(0)
    config = InternLM2Config(**(SHAPE | overrides), attn_implementation=attention)
    llm = InternLM2ForCausalLM(config).eval()
    for name, parameter in llm.named_parameters():  # fresh norms are one and biases zero: both would hide a mistake
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return llm


def as_llama(tensors: dict[str, torch.Tensor], config: InternLM2Config) -> dict[str, torch.Tensor]:
    """Our names and layout -> Llama's, for weights and for gradients."""
    converted = {}
    for name, tensor in tensors.items():
        if "wqkv" in name:
            parts = split_wqkv(tensor, num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim)
            for letter, part in zip("qkv", parts, strict=True):
                converted[name.replace("attention.wqkv", f"self_attn.{letter}_proj")] = part
            continue
        name = "lm_head.weight" if name == "output.weight" else name
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        converted[name] = tensor
    return converted


def llama_twin(llm: InternLM2ForCausalLM, attention: str | None = None) -> LlamaForCausalLM:
    config = llm.config
    shared = {name: getattr(config, name) for name in SHAPE if name not in ("rope_theta", "bias")}
    twin = LlamaForCausalLM(
        LlamaConfig(
            **shared,
            attention_bias=config.bias,
            rope_parameters=copy.deepcopy(config.rope_parameters),
            attn_implementation=attention or config._attn_implementation,
        )
    )
    twin.load_state_dict(as_llama(llm.state_dict(), config))
    return twin.to(llm.dtype).eval()


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(length))


def left_padded(length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :7] = 0
    return {"input_ids": tokens(length), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("length", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_llama(variant: str, attention: str, length: int) -> None:
    llm = our_model(attention, **VARIANTS[variant])
    twin = llama_twin(llm)
    assert llm.config._attn_implementation == twin.config._attn_implementation == attention
    ids = tokens(length)
    ours = llm(ids, labels=ids)
    theirs = twin(ids, labels=ids)
    assert theirs.logits.abs().max() > 1  # so that 2e-5 says something
    assert distance(ours.logits, theirs.logits) < 2e-5
    assert distance(ours.loss, theirs.loss) < 1e-5
    padded = left_padded(length)
    real = padded["attention_mask"].bool()
    assert distance(llm(**padded).logits[real], twin(**padded).logits[real]) < 2e-5


@torch.no_grad()
def test_rope_scaling_changes_what_it_should() -> None:
    """The variants above would agree too if both sides ignored the scaling."""
    plain, scaled = our_model(), our_model(**VARIANTS["dynamic"])
    assert torch.equal(plain(tokens(SHORT)).logits, scaled(tokens(SHORT)).logits)
    assert distance(plain(tokens(LONG)).logits, scaled(tokens(LONG)).logits) > 1e-2
    assert distance(plain(tokens(SHORT)).logits, our_model(**VARIANTS["linear"])(tokens(SHORT)).logits) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_llama_for_every_parameter(variant: str) -> None:
    llm = our_model(**VARIANTS[variant])
    twin = llama_twin(llm)
    batch = left_padded(LONG)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (llm, twin):
        model(**batch, labels=labels).loss.backward()
    ours = as_llama({name: parameter.grad for name, parameter in llm.named_parameters()}, llm.config)
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    padding_row = twin.config.pad_token_id  # Llama freezes it
    theirs["model.embed_tokens.weight"][padding_row] = ours["model.embed_tokens.weight"][padding_row]
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # a key bias shifts all scores of a query alike, so softmax gives it no gradient but rounding
        scale = 1.0 if name.endswith("k_proj.bias") else gradient.abs().max().item()
        assert distance(ours[name], gradient) < 2e-5 * scale, name


def test_gradient_of_the_end_token_is_not_frozen() -> None:
    llm = our_model()
    ids = torch.tensor([[5, 2, 7]])  # 2 is pad and eos
    llm(ids, labels=ids).loss.backward()
    assert llm.model.tok_embeddings.weight.grad[2].abs().max() > 0
    assert llm.model.tok_embeddings.weight[2].abs().max() > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_llama_at_every_step(variant: str, attention: str) -> None:
    """From 28 to 40 tokens, over the edge of max_position_embeddings, where dynamic scaling sets in."""
    llm = our_model(attention, **VARIANTS[variant])
    twin = llama_twin(llm)
    ids = tokens(40)
    caches: list[Any] = [None, None]
    for step in [ids[:, :28], *ids[:, 28:].split(1, dim=1)]:
        outputs = [model(step, past_key_values=cache) for model, cache in zip((llm, twin), caches, strict=True)]
        caches = [output.past_key_values for output in outputs]
        assert distance(outputs[0].logits, outputs[1].logits) < 2e-5
    if "dynamic" not in variant:  # dynamic keys in the cache keep the scale of their time, as in the published code
        assert distance(outputs[0].logits[:, -1], llm(ids).logits[:, -1]) < 2e-5


@pytest.mark.parametrize("attention", ["sdpa", attention_name("sdpa")])
@pytest.mark.parametrize("variant", ["gqa", "bias mha", "dynamic"])
@torch.no_grad()
def test_generate_equals_llama_with_left_padding(variant: str, attention: str) -> None:
    llm = our_model(attention, **VARIANTS[variant])
    twin = llama_twin(llm, attention="sdpa")
    padded = left_padded(SHORT)
    padded.pop("position_ids")
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    generated = llm.generate(**padded, **settings)
    assert generated.shape == (2, SHORT + 16)
    assert torch.equal(generated, twin.generate(**padded, **settings))


@pytest.mark.parametrize("variant", ["gqa", "bias", "dynamic"])
@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_llama_in_bf16(variant: str) -> None:
    llm = our_model(**VARIANTS[variant])
    ids = tokens(LONG)
    exact = llm(ids).logits
    twin = llama_twin(llm)
    half, half_twin = llm.to(torch.bfloat16), twin.to(torch.bfloat16)
    ours, theirs = half(ids).logits.float(), half_twin(ids).logits.float()
    assert half(ids).logits.dtype == torch.bfloat16
    assert (ours - exact).square().mean() < 1.1 * (theirs - exact).square().mean()
    assert distance(ours, exact) < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (6, 3)])
def test_wqkv_rows_are_where_the_published_layout_puts_them(heads: int, kv_heads: int) -> None:
    head_dim, groups = 4, heads // kv_heads
    rows = torch.arange((heads + 2 * kv_heads) * head_dim)
    query, key, value = split_wqkv(rows, num_key_value_heads=kv_heads, head_dim=head_dim)
    for head in range(heads):
        for d in range(head_dim):
            i, j = divmod(head, groups)
            assert query[head * head_dim + d] == (i * (groups + 2) + j) * head_dim + d
    for i in range(kv_heads):
        for d in range(head_dim):
            assert key[i * head_dim + d] == (i * (groups + 2) + groups) * head_dim + d
            assert value[i * head_dim + d] == (i * (groups + 2) + groups + 1) * head_dim + d
    assert torch.equal(merge_wqkv(query, key, value, head_dim=head_dim), rows)
    weight = torch.randn(rows.numel(), 5)
    parts = split_wqkv(weight, num_key_value_heads=kv_heads, head_dim=head_dim)
    assert torch.equal(merge_wqkv(*parts, head_dim=head_dim), weight)
