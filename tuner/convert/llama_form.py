"""InternLM2 and the Llama that it is but for one fused projection: names, rows and settings of one as the other's."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from tuner.convert.layout import Rows, Source
from tuner.errors import UserError
from tuner.model.internlm2.configuration import ROPE_SCALING_TYPES, InternLM2Config

Sources = dict[str, Source]
Shapes = dict[str, tuple[int, ...]]
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
IN_LAYERS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""InternLM2's names of modules and Llama's; the fused `attention.wqkv` is q_proj, k_proj and v_proj"""
OUTSIDE = {"model.tok_embeddings": "model.embed_tokens", "model.norm": "model.norm", "output": "lm_head"}
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
"""settings with one name and meaning in both"""


@dataclass(frozen=True)
class Heads:
    """How the rows of the fused projection lie (`model.internlm2.weights`): for each key head its query heads first."""

    num_key_value_heads: int
    groups: int
    head_dim: int

    def split(self, wqkv: Source) -> tuple[Rows, Rows, Rows]:
        """The rows of the query, key and value projections."""
        return (
            self._every(wqkv, 0, self.groups),
            self._every(wqkv, self.groups, 1),
            self._every(wqkv, self.groups + 1, 1),
        )

    def _every(self, wqkv: Source, begin: int, count: int) -> Rows:
        size = self.head_dim
        starts = [(place * (self.groups + 2) + begin) * size for place in range(self.num_key_value_heads)]
        return Rows(tuple((wqkv, start, start + count * size) for start in starts))

    def merge(self, query: Source, key: Source, value: Source) -> Rows:
        """The fused rows of the three."""
        ranges: list[tuple[Source, int, int]] = []
        for place in range(self.num_key_value_heads):
            for source, count in ((query, self.groups), (key, 1), (value, 1)):
                ranges.append((source, place * count * self.head_dim, (place + 1) * count * self.head_dim))
        return Rows(tuple(ranges))


def heads_of(config: InternLM2Config | LlamaConfig) -> Heads:
    """From either configuration."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return Heads(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim)


def as_llama(tensors: Mapping[str, Source], heads: Heads) -> Sources:
    """InternLM2's names and layout -> Llama's."""
    found: Sources = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        layer = LAYER.fullmatch(module)
        if layer and layer[2] == "attention.wqkv":
            prefix = f"model.layers.{layer[1]}.self_attn"
            found |= {
                f"{prefix}.{letter}_proj.{kind}": part for letter, part in zip("qkv", heads.split(tensor), strict=True)
            }
        elif layer:
            found[f"model.layers.{layer[1]}.{IN_LAYERS[layer[2]]}.{kind}"] = tensor
        else:
            found[f"{OUTSIDE[module]}.{kind}"] = tensor
    return found


def as_internlm2(tensors: Mapping[str, Source], heads: Heads) -> Sources:
    """Llama's names and layout -> InternLM2's."""
    inside = {theirs: ours for ours, theirs in IN_LAYERS.items()}
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    found: Sources = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        layer = LAYER.fullmatch(module)
        if layer and layer[2] == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"model.layers.{layer[1]}.attention.wqkv.{kind}"] = heads.merge(*parts)
        elif layer and layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"model.layers.{layer[1]}.{inside[layer[2]]}.{kind}"] = tensor
        elif not layer:
            found[f"{outside[module]}.{kind}"] = tensor
    return found


def internlm2_shapes(config: InternLM2Config) -> Shapes:
    """Name -> shape of every tensor that a model of this configuration has."""
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    assert config.num_key_value_heads is not None
    fused = heads + 2 * config.num_key_value_heads * config.head_dim
    layer: Shapes = {
        "attention.wqkv.weight": (fused, hidden),
        "attention.wo.weight": (hidden, heads),
        "feed_forward.w1.weight": (wide, hidden),
        "feed_forward.w3.weight": (wide, hidden),
        "feed_forward.w2.weight": (hidden, wide),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    if config.bias:
        layer |= {"attention.wqkv.bias": (fused,), "attention.wo.bias": (hidden,)}
    table = (config.vocab_size, hidden)
    shapes: Shapes = {"model.tok_embeddings.weight": table, "model.norm.weight": (hidden,)}
    for place in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{place}.{name}": shape for name, shape in layer.items()}
    return shapes if config.tie_word_embeddings else {**shapes, "output.weight": table}


def llama_shapes(config: InternLM2Config) -> Shapes:
    """The same under Llama's names."""
    sources: Sources = {name: Shape(shape) for name, shape in internlm2_shapes(config).items()}
    return {name: source.shape for name, source in as_llama(sources, heads_of(config)).items()}


@dataclass(frozen=True)
class Shape:
    """A source of which only the shape is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def rows(self, first: int, last: int) -> torch.Tensor:
        """There are none."""
        raise NotImplementedError


def llama_settings(config: InternLM2Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's config.json; `rope_scaling` in the spelling that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, name) for name in SHARED},
        "attention_bias": config.bias,
        "mlp_bias": False,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": scaling.pop("type"), **scaling},
        **dtype_of(settings),
    }


def internlm2_settings(config: LlamaConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """InternLM2's config.json, in the published spelling.

    Raises:
        UserError: this Llama has what InternLM2 has not.
    """
    assert config.rope_parameters is not None
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    wrong = [
        text
        for broken, text in [
            (config.mlp_bias, "mlp_bias (InternLM2's feed-forward layers have no bias)"),
            (config.head_dim * config.num_attention_heads != config.hidden_size, f"head_dim={config.head_dim}"),
            (
                kind not in ("default", *ROPE_SCALING_TYPES),
                f"rope type {kind!r} (InternLM2's: {', '.join(ROPE_SCALING_TYPES)}, none)",
            ),
            (rope.get("partial_rotary_factor", 1) != 1, "partial_rotary_factor"),
        ]
        if broken
    ]
    if wrong:
        raise UserError(f"This Llama is no InternLM2: it has {', '.join(wrong)}.")
    rest = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    scaling = None if kind == "default" else {"type": kind, **rest}
    made = InternLM2Config(
        **{name: getattr(config, name) for name in SHARED},
        bias=config.attention_bias,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        architectures=["InternLM2ForCausalLM"],
    )
    written = json.loads(made.to_json_string())
    del written["transformers_version"]
    return written | dtype_of(settings)


def dtype_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What config.json says of its weights' dtype, under the name that every transformers reads."""
    stated = settings.get("torch_dtype", settings.get("dtype"))
    return {"torch_dtype": stated} if stated else {}
