"""What a config gets wrong with an optimizer that is in the backward pass: clipping, accumulation, fp16, DeepSpeed."""

from collections.abc import Mapping
from typing import Any

from tuner.engine.in_backward import is_wanted, obstacles


def wrong_in_backward(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What does not go together with `optimizer_in_backward`; `parts` are the config's nodes by their dotted paths."""
    wrapper, strategy = parts.get("optim_wrapper", {}), parts.get("strategy", {})
    if not is_wanted(wrapper):
        return []
    return obstacles(
        max_norm=parts.get("optim_wrapper.clip_grad", {}).get("max_norm"),
        precision=strategy.get("precision", "bf16"),
        deepspeed=strategy.get("deepspeed"),
        num_batches=packs_of_a_rank(parts.get("train_dataloader", {})),
    )


def packs_of_a_rank(loader: Mapping[str, Any]) -> int:
    """In a step, at most; of stages that say no `tokens_per_step`, which is of all ranks."""
    number, stages = loader.get("num_accumulation_steps", 1), loader.get("stages") or ()
    length = (loader.get("dataset") or {}).get("max_length")
    if type(number) is not int or type(length) is not int:
        return 1  # told elsewhere
    lengths = [stage.get("max_length") for stage in stages if isinstance(stage, Mapping)]
    shortest = min([part for part in lengths if type(part) is int and part > 0], default=length)
    return max(number, number * length // shortest)
