"""What rotary embeddings must give, by their published formulas in float64, from nothing but a config.json."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.errors import UserError

Floats = NDArray[np.float64]
ROPE_KEYS = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"
DEFAULT_BASE = 10000.0


class Rope(NamedTuple):
    """Rotary settings as a config.json has them; `settings` are those of the scaling."""

    kind: str
    base: float
    dims: int  # of a head that are turned
    trained_length: int  # positions that the model was trained on, as far as its config says
    settings: Mapping[str, Any]

    @property
    def factor(self) -> float:
        """By how much the scaling stretches."""
        if self.settings.get("factor") is None:
            return self.settings["max_position_embeddings"] / self.trained_length
        return float(self.settings["factor"])

    @property
    def reach(self) -> int:
        """Positions that the settings are meant for."""
        stretch = 1.0 if self.kind in ("default", "dynamic") else self.factor
        longest = self.trained_length if self.kind == "dynamic" else self.settings["max_position_embeddings"]
        return max(longest, round(self.trained_length * stretch))

    def describe(self) -> str:
        """In words: the base, what is done to it, and up to which position that is meant to reach."""
        base = f"base {self.base:,.0f}, {self.dims} dimensions of a head"
        if self.kind == "default":
            return f"no scaling; {base}; meant for positions to {self.reach:,}"
        if self.kind == "dynamic":
            return f"dynamic, factor {self.factor:g}; {base} up to {self.reach:,} tokens, a greater base beyond"
        reach = f"{self.reach:,}, first trained to {self.trained_length:,}"
        return f"{self.kind}, factor {self.factor:g}; {base}; meant for positions to {reach}"


def rope_type(raw: Mapping[str, Any]) -> str:
    """The kind of scaling that a config.json names; "default" where it names none."""
    rope = _scaling(raw)
    return rope.get("rope_type") or rope.get("type") or "default"


def read_ropes(raw: Mapping[str, Any], head_size: int) -> dict[str | None, Rope]:
    """The rotary settings of a config.json by the type of layer; {None: ...} where all layers have the same."""
    scaling = _scaling(raw)
    if scaling and all(isinstance(value, Mapping) for value in scaling.values()):
        return {layers: _read_rope(raw, own, head_size) for layers, own in scaling.items()}
    rope = _read_rope(raw, scaling, head_size)
    if "rope_local_base_freq" in raw:
        local = Rope("default", float(raw["rope_local_base_freq"]), rope.dims, rope.trained_length, rope.settings)
        return {"full_attention": rope, "sliding_attention": local}
    return {None: rope}


def _scaling(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for name in ROPE_KEYS for key, value in (raw.get(name) or {}).items()}


def _read_rope(raw: Mapping[str, Any], scaling: Mapping[str, Any], head_size: int) -> Rope:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in FREQUENCIES:
        raise UserError(
            f"The rope type {kind!r} is none of {', '.join(FREQUENCIES)}, whose formulas this check has. It proves "
            "nothing about others."
        )
    base = scaling.get("rope_theta") or raw.get("rotary_emb_base") or raw.get("rope_theta") or DEFAULT_BASE
    share = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or raw.get("rotary_pct") or 1.0
    longest = raw.get("max_position_embeddings", 2048)
    original = scaling.get(ORIGINAL) or raw.get(ORIGINAL) or longest
    trained_length = longest if kind in ("default", "linear", "dynamic") else original
    settings = {**scaling, "max_position_embeddings": longest}
    return Rope(kind, float(base), int(head_size * share), int(trained_length), settings)


def turns(rope: Rope, positions: NDArray[np.int64], length: int) -> tuple[Floats, float]:
    """Angles (N, D / 2) of positions (N,) in a document of `length` tokens, and the factor of cosine and sine."""
    frequencies, scale = FREQUENCIES[rope.kind](rope, length)
    return positions[:, None] * frequencies, scale


def bare(rope: Rope) -> Rope:
    """The same without its scaling."""
    return rope._replace(kind="default")


def plain(rope: Rope, length: int) -> tuple[Floats, float]:
    """Angle per position (D / 2,): base ** (-2 i / D)."""
    return _powers(rope, rope.base), 1.0


def _powers(rope: Rope, base: float) -> Floats:
    return base ** -(np.arange(0, rope.dims, 2) / rope.dims)


def linear(rope: Rope, length: int) -> tuple[Floats, float]:
    """Positions are divided by the factor."""
    return _powers(rope, rope.base) / rope.factor, 1.0


def dynamic_base(rope: Rope, length: int) -> float:
    """The base grows with what a document has beyond the trained length."""
    if length <= rope.trained_length:
        return rope.base
    stretched = rope.factor * length / rope.trained_length - (rope.factor - 1)
    return rope.base * stretched ** (rope.dims / (rope.dims - 2))


def dynamic(rope: Rope, length: int) -> tuple[Floats, float]:
    """Dynamic NTK: plain with the base of this length."""
    return _powers(rope, dynamic_base(rope, length)), 1.0


def yarn(rope: Rope, length: int) -> tuple[Floats, float]:
    """Slow frequencies are divided by the factor, fast ones stay, a ramp over dimensions lies between."""
    kept = _powers(rope, rope.base)
    settings, half = rope.settings, rope.dims // 2

    def dimension(num_turns: float) -> float:
        """Where a frequency makes so many turns in the trained length."""
        return rope.dims * math.log(rope.trained_length / (2 * math.pi * num_turns)) / (2 * math.log(rope.base))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    share = np.clip((np.arange(half) - low) / (high - low or 0.001), 0, 1)  # of the divided frequency
    return kept * (1 - share) + kept / rope.factor * share, _yarn_scale(rope)


def _yarn_scale(rope: Rope) -> float:
    """The temperature, put on cosine and sine."""
    settings = rope.settings
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 1 + 0.1 * weight * math.log(rope.factor)

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings["mscale"]) / scale(settings["mscale_all_dim"])
    return scale(1.0)


def llama3(rope: Rope, length: int) -> tuple[Floats, float]:
    """By wavelength: long ones are divided by the factor, short ones stay, between them it goes over smoothly."""
    kept = _powers(rope, rope.base)
    low, high = float(rope.settings["low_freq_factor"]), float(rope.settings["high_freq_factor"])
    num_turns = rope.trained_length * kept / (2 * math.pi)  # in the trained length
    share = np.clip((num_turns - low) / (high - low), 0, 1)  # of the frequency as it was
    return kept * share + kept / rope.factor * (1 - share), 1.0


def longrope(rope: Rope, length: int) -> tuple[Floats, float]:
    """A factor for each frequency, of two lists: one for documents beyond the trained length."""
    kept = _powers(rope, rope.base)
    name = "long_factor" if length > rope.trained_length else "short_factor"
    scale = rope.settings.get("attention_factor")
    if scale is None:
        factor = max(rope.factor, 1.0)
        scale = math.sqrt(1 + math.log(factor) / math.log(rope.trained_length))
    return kept / np.array(rope.settings[name], np.float64), float(scale)


FREQUENCIES = {
    "default": plain,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}
