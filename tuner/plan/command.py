"""`tuner plan`: from a config's text to memory, time and cost on machines that need not be here."""

import json
import math
import time
from typing import Any, NamedTuple

import torch

from tuner.check import check
from tuner.config import loads
from tuner.engine.machine import measured_bandwidth, measured_rate
from tuner.errors import UserError
from tuner.plan.gpus import Gpu, read_gpu, read_link
from tuner.plan.lengths import lengths_of
from tuner.plan.memory import GIB, LABELS, SOURCES, Memory, memory_of
from tuner.plan.setup import Setup, read_setup
from tuner.plan.solve import Choice, Work, solve
from tuner.plan.speed import EFFICIENCY, Speed, speed_of

EXIT_DOES_NOT_FIT = 2
MOST_GPUS = 100_000


class Wanted(NamedTuple):
    """As options say it."""

    gpus: int = 8
    nodes: int = 1
    gpu: str = "H100"
    gpu_memory: str | None = None
    link: str | None = None
    price: float | None = None  # of a GPU for an hour
    solve: bool = False
    measure: bool = False
    as_json: bool = False


def plan(source: str, *, name: str = "config.py", **options: Any) -> int:
    """Print what a step needs; returns 0 where it fits and 2 where it does not.

    Args:
        source: the text of a config with all settings filled in; weights and data of it are not needed.
        name: what messages call the config.
        options: the entries of a `Wanted`.

    Raises:
        UserError: whatever the user can mend.
    """
    started = time.monotonic()
    wanted = Wanted(**options)
    check_numbers(wanted)
    gpu = read_gpu(wanted.gpu, wanted.gpu_memory)
    link_name, link = read_link(wanted.link, gpu, wanted.nodes)
    config = loads(source, name)
    check(config, here=False)
    setup, shapes = read_setup(config, wanted.gpus * wanted.nodes, wanted.gpus)
    lengths = lengths_of(config, setup.num_tokens)
    efficiency = EFFICIENCY
    if wanted.measure:
        gpu, efficiency = measured_here(gpu), 1.0
    memory = memory_of(setup)
    work = Work(gpu, link, lengths.mean, efficiency)
    speed = speed_of(setup, memory.sizes, *work)
    fits = memory.peak.total <= gpu.memory
    choices = solve(setup, work) if wanted.solve else []
    if wanted.as_json:
        print(json.dumps(as_dict(memory, speed, gpu, choices), indent=1))
        return 0 if fits else EXIT_DOES_NOT_FIT
    print(f"{name}: {described(setup)}; shapes from {shapes}")
    print("\n".join(memory_lines(memory, gpu)))
    print(f"\na step (formula; {lengths.source})")
    print("\n".join(speed_lines(setup, speed, work, link_name, wanted.price)))
    if wanted.solve:
        print("\n".join(solve_lines(choices, gpu)))
    print(f"planned in {time.monotonic() - started:.0f} s")
    return 0 if fits else EXIT_DOES_NOT_FIT


def check_numbers(wanted: Wanted) -> None:
    """UserError for a number of machines or a price that there is not."""
    for option, number in (("--gpus", wanted.gpus), ("--nodes", wanted.nodes)):
        if number < 1:
            raise UserError(f"{option} {number}: give 1 or more.")
    if wanted.gpus * wanted.nodes > MOST_GPUS:
        raise UserError(
            f"--gpus {wanted.gpus} --nodes {wanted.nodes}: {wanted.gpus * wanted.nodes:,} GPUs in all; at most "
            f"{MOST_GPUS:,} can be planned. --gpus are those of one node."
        )
    if wanted.price is not None and not 0 <= wanted.price < math.inf:
        raise UserError(f"--price {wanted.price:g}: give what a GPU costs for an hour, 0 or more, such as 2.5.")


def measured_here(gpu: Gpu) -> Gpu:
    """With the rates of this machine's GPU, else its CPU: matrix products in FLOP/s, memory in bytes/s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = measured_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return gpu._replace(flops=flops, bandwidth=measured_bandwidth(device), source="products and copies measured here")


def described(setup: Setup) -> str:
    """A setup in words."""
    holding = {"none": "whole on each rank"}.get(setup.holding, setup.holding)
    sharing = "" if setup.degrees.size == 1 else f", sequences over {setup.degrees.size}"
    return (
        f"{setup.num_ranks} ranks, {holding}{sharing}, packs of {setup.num_tokens:,} tokens, {setup.precision}, "
        f"gradient_checkpointing={setup.checkpointing}, tile_tokens={setup.tile_tokens}"
    )


def memory_lines(memory: Memory, gpu: Gpu) -> list[str]:
    """The parts at the peak, and the verdict."""
    lines = [f"\na rank's memory at its peak, the {memory.peak_phase}"]
    for name, value in memory.peak._asdict().items():
        lines.append(f"  {LABELS[name]:32} {value / GIB:8.2f} GiB   {SOURCES[name]}")
    lines.append(f"  {'all':32} {memory.peak.total / GIB:8.2f} GiB")
    left = (gpu.memory - memory.peak.total) / GIB
    verdict = f"fits, {left:.1f} GiB are left" if left >= 0 else f"DOES NOT FIT: {-left:.1f} GiB too much"
    phases = ", ".join(f"{name} {parts.total / GIB:.1f}" for name, parts in memory.phases.items())
    return [*lines, f"  {gpu.name} has {gpu.memory / GIB:.1f} GiB: {verdict}", f"  by phase, GiB: {phases}"]


def speed_lines(setup: Setup, speed: Speed, work: Work, link: str, price: float | None) -> list[str]:
    """FLOPs, seconds, money."""
    gpu, seconds = work.gpu, speed.seconds_with_needles
    hours = setup.num_ranks * seconds / 3600
    needles, beside = [], ""
    if setup.needles is not None:
        every = f"every {setup.needles.interval:,} steps"
        needles = [f"  needles {speed.needle_seconds:.2f} s {every}: {len(setup.needles.packs):,} packs, forward only"]
        beside = f", {seconds:.2f} s with its share of them"
    host = f", the host {speed.host_seconds:.2f} s (PCIe and its own memory)" if speed.host_seconds else ""
    money = "" if price is None else f", {hours * price:.3g} at {price:g} an hour"
    return [
        f"  tokens {speed.num_tokens:,.0f}; FLOPs needed {speed.model_flops:.3g}, computed {speed.hardware_flops:.3g}",
        f"  computing {speed.compute_seconds:.2f} s ({gpu.flops / 1e12:.3g} TFLOP/s by {gpu.source}, of which "
        f"{work.efficiency:.0%} are taken to be reached), optimizer {speed.optimizer_seconds:.2f} s "
        f"({gpu.bandwidth / 1e12:.3g} TB/s){host}",
        f"  links {speed.link_seconds:.2f} s beside it ({link}, {work.link / 1e9:g} GB/s; "
        f"{speed.sent / 1e9:.2f} GB a rank)",
        *needles,
        f"  {speed.seconds:.2f} s{beside}, {speed.num_tokens / seconds:,.0f} tokens/s, {hours:.3g} GPU hours{money}",
    ]


def solve_lines(choices: list[Choice], gpu: Gpu) -> list[str]:
    """The Pareto table, and the first line to paste."""
    if not choices:
        return [f"\nnothing that was tried fits {gpu.memory / GIB:.1f} GiB: more GPUs, shorter packs or tiles, or LoRA"]
    lines = ["\nwhat fits, and no other is better in both      GiB   s/step"]
    for choice in choices:
        lines.append(f"  {choice.memory.peak.total / GIB:6.1f} {choice.seconds:8.2f}   {choice.line()}")
    return [*lines, f"paste, in place of such settings as are given: {choices[0].line()}"]


def as_dict(memory: Memory, speed: Speed, gpu: Gpu, choices: list[Choice]) -> dict[str, Any]:
    """All figures, for JSON; bytes and seconds."""
    parts = {name: {"bytes": round(value), "by": SOURCES[name]} for name, value in memory.peak._asdict().items()}
    return {
        "fits": memory.peak.total <= gpu.memory,
        "peak_bytes": round(memory.peak.total),
        "peak_phase": memory.peak_phase,
        "parts": parts,
        "gpu": gpu._asdict(),
        "step": {**speed._asdict(), "seconds": speed.seconds, "seconds_with_needles": speed.seconds_with_needles},
        "solve": [
            {"settings": choice.line(), "bytes": round(choice.memory.peak.total), "seconds": choice.seconds}
            for choice in choices
        ],
    }
