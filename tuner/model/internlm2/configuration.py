"""InternLM2's configuration: the published keys and defaults, read and written as the published code spells them."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from tuner.errors import UserError

REWARD_TOKEN_ID = 92527  # [UNUSED_TOKEN_130], which ends a conversation that a published reward model scores
ORIGINAL = "original_max_position_embeddings"
ROPE_SCALING_TYPES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""and what each takes beside its factor; YaRN is unknown to the published code, but not to inference engines"""
PUBLISHED_ATTENTION = "eager"  # what every released config.json says


def _scaling_entries(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Either spelling of the rope dictionary as {"rope_type", ...}, without its repetitions."""
    entries = copy.deepcopy(scaling or {})
    old_type = entries.pop("type", None)
    new_type = entries.pop("rope_type", None)
    if old_type and new_type and old_type != new_type:
        raise UserError(f"rope_scaling names two types: type={old_type!r}, rope_type={new_type!r}. Keep one of them.")
    return {"rope_type": old_type or new_type or "default", **entries}


def _rope_parameters(rope_theta: float | None, *spellings: dict[str, Any] | None) -> dict[str, Any]:
    """The one checked dictionary that transformers reads, out of the keys that a config.json may hold.

    Args:
        rope_theta: the top-level key, None when the file has none; 10000 is the published default.
        spellings: `rope_scaling` and `rope_parameters` as found.

    Raises:
        UserError: two spellings disagree, or the type, the factor or theta is not one InternLM2 has.
    """
    given = [_scaling_entries(spelling) for spelling in spellings if spelling]
    merged: dict[str, Any] = {}
    for entries in [*given, {} if rope_theta is None else {"rope_theta": rope_theta}]:
        for key, value in entries.items():
            if merged.setdefault(key, value) != value:
                raise UserError(f"The config gives {key} twice: {merged[key]!r} and {value!r}. Keep one of them.")
    merged.setdefault("rope_type", "default")
    merged.setdefault("rope_theta", PreTrainedConfig.default_theta)
    _check_rope(merged)
    return merged


def _check_rope(rope: dict[str, Any]) -> None:
    theta, factor = rope["rope_theta"], rope.get("factor")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"rope_theta={theta!r} must be a positive number.")
    if rope["rope_type"] == "default":
        allowed = {"rope_type", "rope_theta"}
    elif rope["rope_type"] in ROPE_SCALING_TYPES:
        allowed = {"rope_type", "rope_theta", "factor", *ROPE_SCALING_TYPES[rope["rope_type"]]}
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
            raise UserError(f"rope_scaling's factor={factor!r} must be a number of at least 1.")
    else:
        raise UserError(
            f"rope_scaling has the type {rope['rope_type']!r}; InternLM2 has {', '.join(ROPE_SCALING_TYPES)}, "
            "or null for none."
        )
    if unknown := sorted(set(rope) - allowed):
        raise UserError(f"rope_scaling has {', '.join(unknown)}, which its type {rope['rope_type']!r} does not take.")


@strict
class InternLM2Config(PreTrainedConfig):
    """Shape and constants of an InternLM2; class defaults are those of the published configuration class.

    `rope_scaling` may be null or {"type" or "rope_type": "linear" | "dynamic" | "yarn", "factor": >= 1} with what YaRN
    takes, `rope_theta` beside it, or both may come as `rope_parameters`, transformers 5's spelling. What is saved is
    the published spelling, because the published code, lmdeploy and older transformers read nothing else.

    `attn_implementation` in a config.json is a note to the published code (every release says "eager"): it is kept
    for it and does not choose the attention here. `from_pretrained(..., attn_implementation=...)` does.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 103168
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    bias: bool = True
    rope_parameters: dict | None = None
    reward_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        rope_theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        self.rope_parameters = _rope_parameters(rope_theta, scaling, self.rope_parameters)
        stated_head_dim = kwargs.pop("head_dim", None)  # other converters write it
        self._published_attention = kwargs.pop("published_attention", PUBLISHED_ATTENTION)
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here too: the error of @strict, which comes later, is no UserError
        if stated_head_dim not in (None, self.head_dim):
            raise UserError(f"head_dim={stated_head_dim}: InternLM2's is hidden_size / heads = {self.head_dim}.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        assert self.rope_parameters is not None
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = _rope_parameters(value, self.rope_scaling)

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The published spelling: {"type", "factor"}, and what YaRN takes; None for plain rotary embeddings."""
        assert self.rope_parameters is not None
        if self.rope_parameters["rope_type"] == "default":
            return None
        rest = {key: value for key, value in self.rope_parameters.items() if key not in ("rope_type", "rope_theta")}
        return {"type": self.rope_parameters["rope_type"], **rest}

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        inherited = None if value and "rope_theta" in value else self.rope_theta
        self.rope_parameters = _rope_parameters(inherited, value)

    @property
    def torch_dtype(self) -> Any:
        """The published name of `dtype`, without transformers 5's warning, since saving reads it by this name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    def validate_architecture(self) -> None:
        """Check what the layers assume (transformers calls this when a config is made and when it is saved).

        Raises:
            UserError: with every mistake found, one a line.
        """
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        assert kv_heads is not None
        counts = {name: getattr(self, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
        problems = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
        if not problems:
            rules = [
                (self.hidden_size % heads, f"hidden_size={self.hidden_size} does not divide by {heads} heads"),
                (heads % kv_heads, f"{heads} attention heads do not divide by num_key_value_heads={kv_heads}"),
                (self.head_dim % 2, f"a head of {self.head_dim} is odd; rotary embeddings need pairs"),
                (self.hidden_act not in ACT2FN, f"hidden_act={self.hidden_act!r} is no activation of transformers"),
            ]
            problems = [text for broken, text in rules if broken]
        if problems:
            raise UserError("\n".join(problems))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a config.json's content; `kwargs` override it (see `PreTrainedConfig.from_dict`)."""
        config_dict = dict(config_dict)
        if "attn_implementation" in config_dict:
            config_dict["published_attention"] = config_dict.pop("attn_implementation")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All keys in the published spelling (`torch_dtype`, `rope_theta`, `rope_scaling`)."""
        output = super().to_dict()
        output.pop("rope_parameters")
        if output["reward_token_id"] is None:
            output.pop("reward_token_id")
        if (dtype := output.pop("dtype", None)) is not None:
            output["torch_dtype"] = dtype
        output["attn_implementation"] = output.pop("_published_attention")
        return output | {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
