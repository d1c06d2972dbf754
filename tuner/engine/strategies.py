"""Which strategy a config asks for: the whole model on every rank, or cut over them by DeepSpeed's ZeRO or by FSDP2."""

from collections.abc import Mapping
from typing import Literal

from tuner.engine.replicated import Replicated
from tuner.engine.strategy import Strategy
from tuner.engine.world import read_world
from tuner.errors import UserError


def build_strategy(
    *,
    deepspeed: str | None = None,
    offload_directory: str | None = None,
    hpz_partition_size: int | None = None,
    fsdp: Literal["full", "hybrid"] | None = None,
    accumulate: Literal["whole", "rows"] | None = None,
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
        fsdp: cuts them by torch's FSDP2, over all ranks ("full") or those of a node ("hybrid"), see `FullyShard`.
        accumulate: for fsdp, see `FullyShard`; None is "rows".
        precision, sequence_parallel_size, device: as `Strategy` takes them.

    Raises:
        UserError: settings that do not fit each other, or DeepSpeed is not installed.
    """
    if deepspeed is None:
        refuse_without("deepspeed", offload_directory=offload_directory, hpz_partition_size=hpz_partition_size)
    if fsdp is None:
        refuse_without("fsdp", accumulate=accumulate)
    if deepspeed is None and fsdp is None:
        return Replicated(precision=precision, sequence_parallel_size=sequence_parallel_size, device=device)
    if fsdp is not None:
        if deepspeed is not None:
            raise UserError(two_at_once(deepspeed, fsdp))
        from tuner.engine.fsdp import FullyShard, refuse_one_process

        refuse_one_process(fsdp, read_world())  # before data are prepared
        return FullyShard(
            fsdp=fsdp,
            accumulate=accumulate or "rows",
            precision=precision,
            sequence_parallel_size=sequence_parallel_size,
            device=device,
        )
    assert deepspeed is not None
    from tuner.engine.zero import Zero  # only those who ask for it need DeepSpeed

    return Zero(
        deepspeed,
        offload_directory=offload_directory,
        hpz_partition_size=hpz_partition_size,
        precision=precision,
        sequence_parallel_size=sequence_parallel_size,
        device=device,
    )


def refuse_without(strategy: str, **details: object) -> None:
    """UserError for a detail of a strategy that is not chosen."""
    for name, value in details.items():
        if value is not None:
            raise UserError(f"{name}={value!r} says how {strategy} holds a model, but {strategy} is None. Set both.")


def two_at_once(deepspeed: str, fsdp: str) -> str:
    """What to say where both are chosen."""
    return f"deepspeed={deepspeed!r} and fsdp={fsdp!r} both cut the model over the ranks. Set one of them to None."
