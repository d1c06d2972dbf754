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
    asks = [f"quantise={adapter['quantise']!r}" for adapter in adapters if adapter.get("quantise")]
    asks += [f"optimizer={kind!r}"] if kind == EIGHT_BITS else []
    if asks and find_spec("bitsandbytes") is None:
        problems.append(f"{' and '.join(asks)} cannot do without bitsandbytes: pip install 'tuner[qlora]'")
    return problems


def stage_of(deepspeed: object) -> int:
    """0 where there is none, or none that can be read, which others say."""
    if not isinstance(deepspeed, str):
        return 0
    try:
        return zero_stage(deepspeed)
    except UserError:
        return 0
