"""Which strategy a config asks for: the whole model on every rank, or cut over the ranks by DeepSpeed's ZeRO."""

from collections.abc import Mapping
from typing import Literal

from tuner.engine.replicated import Replicated
from tuner.engine.strategy import Strategy
from tuner.errors import UserError


def build_strategy(
    *,
    deepspeed: str | None = None,
    offload_directory: str | None = None,
    hpz_partition_size: int | None = None,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    sequence_parallel_size: int | Mapping[str, int] = 1,
    device: str = "auto",
) -> Strategy:
    """How weights, gradients and optimizer state are held over the ranks of a run.

    Args:
        deepspeed: None holds all of them on every rank; a name of `tuner.engine.zero_config.PRESETS` or a JSON file
            of DeepSpeed's cuts them.
        offload_directory: for "zero3_offload", see `Zero`.
        hpz_partition_size: for "zero3_hpz", see `Zero`.
        precision, sequence_parallel_size, device: as `Strategy` takes them.

    Raises:
        UserError: settings that do not fit each other, or DeepSpeed is not installed.
    """
    if deepspeed is None:
        for name, value in {"offload_directory": offload_directory, "hpz_partition_size": hpz_partition_size}.items():
            if value is not None:
                raise UserError(f"{name}={value!r} says how DeepSpeed cuts a model, but deepspeed is None. Set both.")
        return Replicated(precision=precision, sequence_parallel_size=sequence_parallel_size, device=device)
    from tuner.engine.zero import Zero  # only those who ask for it need DeepSpeed

    return Zero(
        deepspeed,
        offload_directory=offload_directory,
        hpz_partition_size=hpz_partition_size,
        precision=precision,
        sequence_parallel_size=sequence_parallel_size,
        device=device,
    )
