"""What an adapter's config gets wrong with its strategy and its optimizer: DoRA, LoRA+, moments of 8 bits."""

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

from tuner.engine.zero_config import zero_stage
from tuner.errors import UserError

EIGHT_BITS = "adamw8bit"


def wrong_adapters(adapters: Collection[Mapping[str, Any]], parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What does not go together; single values, and 4 bits that would be cut, are looked at elsewhere.

    Args:
        adapters: the arguments of each `LoRA` in the config.
        parts: the config's nodes by their dotted paths.
    """
    strategy, wrapper = parts.get("strategy", {}), parts.get("optim_wrapper", {})
    kind = parts.get("optim_wrapper.optimizer", {}).get("kind")
    stage, fsdp = stage_of(strategy.get("deepspeed")), strategy.get("fsdp")
    problems = []
    if kind == EIGHT_BITS and (stage or fsdp):
        spread = f"fsdp={fsdp!r}" if fsdp else f"deepspeed={strategy['deepspeed']!r}"
        problems.append(
            f"optimizer={EIGHT_BITS!r} keeps its state in blocks of whole tensors, which {spread} cuts. Set "
            "optimizer='adamw', whose state is then spread over the ranks."
        )
    if not adapters and wrapper.get("lora_plus_ratio") is not None:
        problems.append("lora_plus_ratio is for the B of an adapter, and here all weights train. Set it to None.")
    if stage == 3 and any(adapter.get("variant") == "dora" for adapter in adapters):
        problems.append(
            f"lora_variant='dora' takes the length of each row of a weight, of which deepspeed="
            f"{strategy['deepspeed']!r} leaves no rank a whole one. Set deepspeed='zero2', or fsdp='full' in its "
            "place, or lora_variant='rslora'."
        )
    if adapters and (names := rope_settings(parts)):
        problems.append(
            f"{', '.join(names)}: an adapter is saved without a config.json, so that nobody who loads it on its base "
            "would turn as it was trained to. Copy the base, write the rotary settings into the copy's config.json, "
            "and train on that: it is then the base for all."
        )
    asks = [f"quantise={adapter['quantise']!r}" for adapter in adapters if adapter.get("quantise")]
    asks += [f"optimizer={kind!r}"] if kind == EIGHT_BITS else []
    if asks and find_spec("bitsandbytes") is None:
        problems.append(f"{' and '.join(asks)} cannot do without bitsandbytes: pip install 'tuner[qlora]'")
    return problems


def rope_settings(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the settings, of the config and of its stages, that change the rotary embedding."""
    rope, stages = parts.get("rope", {}), parts.get("train_dataloader", {}).get("stages") or ()
    names = [f"rope_{name}" for name in ("theta", "scaling") if rope.get(name) is not None]
    names += [name for stage in stages if isinstance(stage, Mapping) for name in stage if name.startswith("rope_")]
    return list(dict.fromkeys(names))


def stage_of(deepspeed: object) -> int:
    """0 where there is none, or none that can be read, which others say."""
    if not isinstance(deepspeed, str):
        return 0
    try:
        return zero_stage(deepspeed)
    except UserError:
        return 0
