"""A config's model made small enough for a proof on a CPU: the family, the heads and the rotary settings stay."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from tuner.engine.assemble import Assembly, plain
from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.build import build_llm, read_config
from tuner.model.checkpointing import enable_gradient_checkpointing
from tuner.model.rope import Rope, own_rope, replace_rope
from tuner.prove.rope import ORIGINAL, ROPE_KEYS, rope_type

NUM_TOKEN_IDS = 512
HEAD_SIZE = 16
THIN_HEAD_SIZE = 2
SEED = 0
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
AT_MOST = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    **dict.fromkeys(NUM_EXPERTS, 16),
    "sliding_window": 24,  # shorter than the documents, or it would do nothing
}
LENGTH_DEPENDENT = ("dynamic", "longrope")
LONG = 32  # tokens from which rotary scaling that looks at the length acts in a small model
DROPPED = ("quantization_config", "auto_map")
RANDOM = ("resid_pdrop", "embd_pdrop", "hidden_dropout", "residual_dropout")  # dropout draws other units elsewhere


class Family(NamedTuple):
    """The model of a config: what its config.json says, and as transformers reads it."""

    config: PreTrainedConfig
    raw: dict[str, Any]  # with the rotary settings of the run, as what it saves has them
    attention: str  # what the config asks for
    rope: Rope = Rope()
    came: dict[str, Any] | None = None  # raw as the model came, where the run sets `rope`

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values of a layer."""
        return getattr(self.config, "num_key_value_heads", None) or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_heads


def read_family(config: Any) -> Family:
    """Of a loaded config of tuner; only the model's config.json is read.

    Raises:
        UserError: the model is not an SFT on `build_llm`, or of a family that cannot be made small.
    """
    model = config.get("model") or {}
    llm = model.get("llm") or {}
    if model.get("type") is not SFT or llm.get("type") is not build_llm:
        raise UserError("This check knows model = dict(type=SFT, llm=dict(type=build_llm, ...)) and no other model.")
    found = read_config(llm["path"])
    if found.get_text_config() is not found:
        raise UserError(f"{type(found).__name__} holds several models; this check takes a language model alone.")
    raw, _ = PreTrainedConfig.get_config_dict(found.name_or_path, local_files_only=True)
    rope = Assembly(config).build(config.get("rope")) or Rope()
    if rope.is_own:
        return Family(found, raw, llm.get("attention", "auto"))
    chosen = replace_rope(own_rope(found), rope)
    parameters = {"rope_parameters": dict(chosen.parameters), "max_position_embeddings": chosen.max_position_embeddings}
    rest = {name: value for name, value in raw.items() if name not in (*ROPE_KEYS, "rope_theta", ORIGINAL)}
    return Family(found, rest | parameters, llm.get("attention", "auto"), rope, raw)


def narrow(family: Family) -> dict[str, Any]:
    """A config.json with the same heads, each narrow, so that as many ranks can share them."""
    small = _small(family, family.num_heads, family.num_kv_heads, HEAD_SIZE)
    for name in RANDOM:
        if name in small:
            small[name] = 0.0
    if rope_type(small) in LENGTH_DEPENDENT:
        small |= {name: LONG for name in ("max_position_embeddings", ORIGINAL) if name in small}
    return _with_narrow_rope(small, family, HEAD_SIZE)


def thin(family: Family) -> dict[str, Any]:
    """A config.json with the same heads, token ids and dropout, and hardly any width: what a run keeps, not what it is.

    The tokenizer still fits, and any number of ranks that shares the heads can share them here.
    """
    small = _small(family, family.num_heads, family.num_kv_heads, THIN_HEAD_SIZE)
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        small[family.config.attribute_map.get(name, name)] = getattr(family.config, name)
    return _with_narrow_rope(small, family, THIN_HEAD_SIZE)


def _with_narrow_rope(small: dict[str, Any], family: Family, head_size: int) -> dict[str, Any]:
    ropes = {name: small[name] for name in ROPE_KEYS if isinstance(small.get(name), dict)}
    return small | {name: _narrow_rope(rope, family.head_size // 2, head_size) for name, rope in ropes.items()}


def one_head(family: Family) -> dict[str, Any]:
    """A config.json with one head of the real width: its rotary embedding is the real one."""
    return _small(family, 1, 1, family.head_size)


def _small(family: Family, num_heads: int, num_kv_heads: int, head_size: int) -> dict[str, Any]:
    config = family.config
    small = {name: value for name, value in family.raw.items() if name not in DROPPED}

    def put(name: str, value: Any) -> None:
        small[config.attribute_map.get(name, name)] = value

    kinds = getattr(config, "layer_types", None) or []
    chosen = list(dict.fromkeys(kinds))
    num_layers = max(2, len(chosen))
    put("num_hidden_layers", num_layers)
    if kinds:
        put("layer_types", [chosen[place % len(chosen)] for place in range(num_layers)])
    put("num_attention_heads", num_heads)
    if getattr(config, "num_key_value_heads", None) is not None:
        put("num_key_value_heads", num_kv_heads)
    put("hidden_size", num_heads * head_size)
    if getattr(config, "head_dim", None) is not None:
        put("head_dim", head_size)
    put("vocab_size", NUM_TOKEN_IDS)
    for name, most in AT_MOST.items():
        if type(value := getattr(config, name, None)) is int:
            put(name, min(value, most))
    if any(hasattr(config, name) for name in NUM_EXPERTS):
        small["experts_implementation"] = "eager"  # the others have no float64
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if type(value := getattr(config, name, None)) is int:
            put(name, value % NUM_TOKEN_IDS)
    return small


def _narrow_rope(rope: dict[str, Any], num_frequencies: int, head_size: int) -> dict[str, Any]:
    """Factors that a rope has for each frequency, for as many as a narrow head has; lengths that are soon passed."""
    found = {}
    for name, value in rope.items():
        if isinstance(value, list) and len(value) == num_frequencies:
            value = value[: head_size // 2]
        elif name == ORIGINAL and rope_type({"rope_scaling": rope}) in LENGTH_DEPENDENT:
            value = LONG
        found[name] = value
    return found


def write_model(content: dict[str, Any], directory: Path) -> Path:
    """Write a config.json where `build_llm` finds it; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def build_small(config: Any, directory: Path, *, attention: str, dtype: torch.dtype) -> SFT:
    """The config's method on the model in `directory`, with weights that are the same in every process."""
    node = plain(config.model)
    node["llm"] = {**node["llm"], "path": str(directory), "weights": "random", "attention": attention}
    method = Assembly({}).build(node)
    spread(method.llm)
    if dtype == torch.float64 and (choice := (node["llm"].get("memory") or {}).get("gradient_checkpointing")):
        checkpointing = enable_gradient_checkpointing(method.llm, choice)
        checkpointing.contexts = lambda: (Float64(), Float64())  # for both passes
    return method.to(dtype)


@torch.no_grad()
def spread(llm: PreTrainedModel) -> None:
    """Draw weights with which tokens differ: as models are drawn for training, attention is nearly uniform."""
    generator = torch.Generator().manual_seed(SEED)
    embedding = llm.get_input_embeddings().weight
    for parameter in llm.parameters():
        if parameter.ndim == 1:
            mean, spread_by = 1.0 if parameter.mean() > 0.5 else 0.0, 0.2  # norms; biases
        else:
            mean, spread_by = 0.0, 0.2 if parameter is embedding else 1.5 * parameter.shape[-1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(mean + spread_by * drawn)


class Float64(TorchFunctionMode):
    """Inside, whoever asks for float32 gets float64: norms of transformers round there, and a bit decides over 1e-7."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with the wider dtype."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)
