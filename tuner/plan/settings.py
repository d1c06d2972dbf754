"""From one setup to another: the settings that differ, as `tuner train` takes them on its command line."""

import shlex
from collections.abc import Mapping
from typing import Any

from tuner.plan.setup import Setup

ALWAYS = ("deepspeed", "fsdp", "sequence_parallel_size", "gradient_checkpointing", "num_accumulation_steps")


def settings_of(setup: Setup) -> dict[str, Any]:
    """What a recipe calls that which a plan may change."""
    is_fsdp, is_zero = setup.holding == "fsdp", setup.holding not in ("none", "fsdp")
    ulysses, ring = setup.degrees
    return {
        "deepspeed": setup.holding if is_zero else None,
        "fsdp": ("hybrid" if setup.hybrid else "full") if is_fsdp else None,
        "hpz_partition_size": setup.hpz_size,
        "offload_directory": setup.offload_directory if "offload_optimizer" in setup.zero else None,
        "sequence_parallel_size": ulysses if ring == 1 else {"ulysses": ulysses, "ring": ring},
        "gradient_checkpointing": setup.checkpointing,
        "offload_activations": setup.offload_activations,
        "tile_tokens": setup.tile_tokens,
        "max_length": setup.num_tokens,
        "num_accumulation_steps": setup.num_accumulation_steps,
    }


def changes(setup: Setup, origin: Setup) -> dict[str, Any]:
    """The settings of `setup` that are not those of `origin`."""
    before = settings_of(origin)
    changed = {name: value for name, value in settings_of(setup).items() if value != before[name]}
    if is_rounding(setup, origin):
        changed.pop("max_length", None)
    return changed


def is_rounding(setup: Setup, origin: Setup) -> bool:
    """Whether packs are longer only because they have to divide over the ranks, to which training pads them itself."""
    return 0 <= setup.num_tokens - origin.num_tokens < setup.degrees.size


def line(setup: Setup, origin: Setup) -> str:
    """The settings to paste behind a preset, each said that a choice is about or that differs."""
    chosen = settings_of(setup)
    wanted = {name: chosen[name] for name in ALWAYS if chosen[name] is not None}
    return assignments({**wanted, **changes(setup, origin)})


def assignments(settings: Mapping[str, Any]) -> str:
    """{"lr": 1e-5} -> `lr=1e-05`, quoted where a shell would read more into it."""
    return " ".join(shlex.quote(f"{name}={value}") for name, value in settings.items())
