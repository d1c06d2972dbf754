"""Rotary settings of a run: another base or a scaling in place of the model's own, fixed for every batch of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

ORIGINAL = "original_max_position_embeddings"
YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "length"),
    "yarn": ("factor", ORIGINAL, *YARN_KEYS),
}
"""types of scaling, and what each takes beside its type; "default" takes away what the model has"""
KEPT = ("rope_theta", "partial_rotary_factor")  # whatever the scaling
USUAL_FACTOR = 2.0  # of dynamic NTK, as InternLM2 was published with it
BY_LENGTH = ("dynamic", "longrope")  # types that turn a document otherwise by how long it, or its batch, is


@dataclass(frozen=True)
class Rope:
    """What a config asks for; None leaves that to the model.

    Args:
        theta: the base of the frequencies.
        scaling: {"rope_type": "linear" | "dynamic" | "yarn" | "default", "factor": ...} and what the type takes.
        length: tokens that a document may have: dynamic NTK becomes the fixed base of this length, whatever a batch
            holds, and the model says afterwards that it is meant for so many.

    Raises:
        UserError: a base or a scaling that is none.
    """

    theta: float | None = None
    scaling: Mapping[str, Any] | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no model takes."""
        check_theta(self.theta)
        check_scaling(self.scaling)

    @property
    def is_own(self) -> bool:
        """Whether all is left to the model."""
        return self.theta is None and self.scaling is None


class OwnRope(NamedTuple):
    """What a model's config says: transformers' rope_parameters, the positions it is meant for, dimensions turned."""

    parameters: Mapping[str, Any]
    max_position_embeddings: int
    dims: int


def check_theta(theta: object) -> None:
    """UserError unless it is a base, or None."""
    if theta is not None and not (is_number(theta) and 1 < theta < math.inf):  # type: ignore[operator]
        raise UserError(f"rope_theta = {theta!r}: allowed is a number above 1, such as 1000000, or None.")


def check_scaling(scaling: object) -> None:
    """UserError unless it is a scaling, or None."""
    if scaling is None:
        return
    told = f"rope_scaling = {dict(scaling) if isinstance(scaling, Mapping) else scaling!r}"
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in SCALINGS:
        raise UserError(f'{told}: allowed is None, or {{"rope_type": {" or ".join(SCALINGS)}, "factor": a number}}.')
    kind = scaling["rope_type"]
    unknown = [name for name in scaling if name not in ("rope_type", *SCALINGS[kind])]
    if unknown:
        raise UserError(f"{told}: {kind} takes no {unknown[0]!r}.{did_you_mean_or_all(unknown[0], SCALINGS[kind])}")
    if "factor" in SCALINGS[kind] and not (is_number(scaling.get("factor")) and scaling["factor"] >= 1):
        raise UserError(f'{told}: {kind} needs a "factor" of at least 1: by how much it stretches the context.')
    for name in set(scaling) & {"length", ORIGINAL}:
        if type(scaling[name]) is not int or scaling[name] < 1:
            raise UserError(f"{told}: {name} is a whole number of tokens.")


def is_number(value: object) -> bool:
    """An int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def own_rope(config: PreTrainedConfig) -> OwnRope:
    """What a model's config says before anything is replaced.

    Raises:
        UserError: it has no rotary embedding, or several.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_type" not in parameters:
        found = "turns layers of several types each in its own way" if parameters else "has no rotary embedding"
        raise UserError(f"{type(config).__name__} {found}: rope_theta and rope_scaling cannot be set. Make them None.")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dims = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    return OwnRope(dict(parameters), config.max_position_embeddings, dims)


def replace_rope(own: OwnRope, rope: Rope) -> OwnRope:
    """What the config is to say instead.

    Linear keeps `max_position_embeddings`, of which it makes `factor` times as many, as inference engines read it;
    YaRN says both lengths; of a base alone, or dynamic NTK made one, it is what the run trains.
    """
    if rope.is_own:
        return own
    parameters, longest = dict(own.parameters), own.max_position_embeddings
    if rope.theta is not None:
        parameters["rope_theta"] = rope.theta
    length = rope.length or longest
    if rope.scaling is None:
        return own._replace(parameters=parameters, max_position_embeddings=max(longest, length))
    original = rope.scaling.get(ORIGINAL) or parameters.get(ORIGINAL) or longest
    kept: dict[str, Any] = {name: parameters[name] for name in KEPT if name in parameters}
    scaling = {name: value for name, value in rope.scaling.items() if name not in ("rope_type", "length")}
    kind = rope.scaling["rope_type"]
    if kind == "linear":
        return own._replace(parameters={**kept, "rope_type": kind, **scaling}, max_position_embeddings=original)
    if kind == "yarn":
        stretched = {**kept, "rope_type": kind, **scaling, ORIGINAL: original}
        return own._replace(parameters=stretched, max_position_embeddings=round(original * scaling["factor"]))
    length = rope.scaling.get("length") or length
    if kind == "dynamic":
        kept["rope_theta"] = fixed_base(kept["rope_theta"], scaling["factor"], length / original, own.dims)
    longest = max(original, length) if kind == "dynamic" else max(longest, length)
    return own._replace(parameters={**kept, "rope_type": "default"}, max_position_embeddings=longest)


def fixed_base(base: float, factor: float, stretch: float, dims: int) -> float:
    """Dynamic NTK's base for documents `stretch` times as long as those that the model was made for.

    base * (factor * stretch - (factor - 1)) ** (dims / (dims - 2)); the same base where they are no longer.
    """
    return base * max(1.0, factor * stretch - (factor - 1)) ** (dims / (dims - 2))


def set_rope(llm: PreTrainedModel, own: OwnRope, rope: Rope) -> None:
    """Turn as `rope` says from the next forward on, on this rank; `own` is what the model came with.

    Weights stay as they are; the config, and so what is saved, says the same.

    Raises:
        UserError: the model's rotary embedding is not made from its config.
    """
    chosen = replace_rope(own, rope)
    llm.config.rope_parameters = dict(chosen.parameters)
    llm.config.max_position_embeddings = chosen.max_position_embeddings
    modules = [module for module in llm.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if not modules or any(getattr(module, "config", None) is None for module in modules):
        raise UserError(f"{type(llm).__name__} makes no rotary embedding from its config. Make rope settings None.")
    for module in modules:
        _make_again(module, llm.config)


def _make_again(module: nn.Module, config: PreTrainedConfig) -> None:
    """As it would be built with this config, in place: whoever has hooks on the module keeps them."""
    fresh = type(module)(config)
    for name, buffer in fresh.named_buffers(recurse=False):
        device = getattr(module, name).device
        setattr(module, name, buffer.to(device))
    own = {name: value for name, value in vars(fresh).items() if not name.startswith("_")}
    kept = {"training", "held_tokens"}  # of the run, not of the config
    vars(module).update({name: value for name, value in own.items() if name not in kept})


def reach(own: OwnRope) -> int:
    """Positions that a model's rotary settings are meant for."""
    kind, parameters = own.parameters["rope_type"], own.parameters
    if kind == "linear":
        return round(own.max_position_embeddings * parameters["factor"])
    if kind == "yarn":
        return round((parameters.get(ORIGINAL) or own.max_position_embeddings) * (parameters.get("factor") or 1))
    return own.max_position_embeddings


def beyond_reach(own: OwnRope, length: int) -> str | None:
    """What to say, with the remedy, where documents may be longer than a model turns well; None where they may not."""
    meant = reach(own)
    if length <= meant:
        return None
    return f"max_length = {length:,} is {over(own)} Set {remedy(own, length)}, or max_length = {meant}."


def check_learned(config: PreTrainedConfig, length: int, name: str) -> None:
    """UserError where a table of learned positions has no row for a document's last tokens; `name` says who asks."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions and not getattr(config, "rope_parameters", None):
        raise UserError(
            f"{name}: {length:,} tokens, but the model ({type(config).__name__}) has learned positions for "
            f"{positions:,}. Ask for at most {positions}."
        )


def over(own: OwnRope) -> str:
    """What is wrong with a length beyond the reach."""
    kind = own.parameters["rope_type"]
    odd = f" Its {kind} scaling would turn each document by a length of its batch." if kind in BY_LENGTH else ""
    return f"more than the {reach(own):,} positions that the model's rotary embedding is meant for.{odd}"


def remedy(own: OwnRope, length: int) -> str:
    """Settings with which training at that length makes sense."""
    base = own.parameters["rope_theta"]
    factor = math.ceil(length / (own.parameters.get(ORIGINAL) or own.max_position_embeddings))
    larger = fixed_base(base, USUAL_FACTOR, length / reach(own), own.dims)
    return (
        f"a larger base, rope_theta = {larger:.3g} (it is {base:g}), or "
        f'rope_scaling = {{"rope_type": "yarn", "factor": {factor}}}'
    )
