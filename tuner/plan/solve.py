"""All ways to hold a setup on some GPUs that fit, and of those only the ones that no other beats in memory and time."""

from collections.abc import Iterator
from typing import NamedTuple

from tuner.parallel.mesh import Degrees, head_counts, legal_degrees
from tuner.plan.gpus import Gpu
from tuner.plan.holding import count
from tuner.plan.memory import Memory, memory_of
from tuner.plan.setup import Setup
from tuner.plan.speed import Speed, speed_of

SPREAD = ("none", "zero1", "zero2", "zero3", "fsdp", "zero2_offload", "zero3_offload")
PCIE = 25e9  # bytes/s at which offloaded state comes and goes


class Choice(NamedTuple):
    """One way."""

    setup: Setup
    memory: Memory
    speed: Speed
    seconds: float  # of a step

    def line(self) -> str:
        """The settings to paste."""
        setup = self.setup
        holding = {"none": "", "fsdp": "fsdp=full "}.get(setup.holding, f"deepspeed={setup.holding} ")
        again = setup.checkpointing
        return (
            f"{holding}sequence_parallel_size={setup.degrees.size} gradient_checkpointing={again} "
            f"num_accumulation_steps={setup.num_accumulation_steps}"
        )


def candidates(setup: Setup) -> Iterator[Setup]:
    """The ways to look at; the packs of a step stay as many where they divide. A micro-batch is a pack."""
    sizes = legal_degrees(*head_counts(setup.model.get_text_config()))
    packs = setup.num_accumulation_steps * setup.num_ranks // setup.degrees.size
    for sharing in (size for size in sizes if setup.num_ranks % size == 0):
        others = setup.num_ranks // sharing
        if packs % others:
            continue
        for holding in SPREAD if setup.num_ranks > 1 and setup.lora is None else ("none",):
            for again in (True, "attention", False):
                yield setup._replace(
                    degrees=Degrees(sharing),
                    num_tokens=-(-setup.num_tokens // sharing) * sharing,
                    holding=holding,
                    checkpointing=again,
                    num_accumulation_steps=packs // others,
                    hybrid=False,
                )


def solve(setup: Setup, gpu: Gpu, link: float, squares: float, efficiency: float) -> list[Choice]:
    """The choices that fit and that no other beats in both memory and time, fastest first."""
    found = []
    sizes = count(setup)  # the same for all
    for each in candidates(setup):
        memory = memory_of(each, sizes)
        if memory.peak.total > gpu.memory:
            continue
        speed = speed_of(each, sizes, gpu, link, squares, efficiency)
        found.append(Choice(each, memory, speed, speed.seconds + offload_seconds(each, memory)))
    found.sort(key=lambda choice: (choice.seconds, choice.memory.peak.total))
    best: list[Choice] = []
    for choice in found:
        if not best or choice.memory.peak.total < best[-1].memory.peak.total:
            best.append(choice)
    return best


def offload_seconds(setup: Setup, memory: Memory) -> float:
    """Gradients to the CPU and weights back, over PCIe; the CPU's own step is not counted."""
    if "offload_optimizer" not in setup.zero:
        return 0.0
    return (4 + setup.itemsize) * memory.sizes.trained / setup.num_ranks / PCIE
