"""What a plan has to say to `tuner train`: before the start where a run cannot fit, and where memory ran out in it."""

import logging
from typing import Any, NamedTuple

import torch

from tuner.engine.shortage import Shortage
from tuner.errors import UserError
from tuner.plan.gpus import GPUS, Gpu, read_link, read_size
from tuner.plan.lengths import lengths_of
from tuner.plan.memory import GIB, LABELS, Memory, memory_of
from tuner.plan.remedy import find_remedy
from tuner.plan.setup import Setup, read_setup
from tuner.plan.solve import Work
from tuner.plan.speed import EFFICIENCY

logger = logging.getLogger("tuner")
HELPS = 0.9  # of what was planned: at most so much must be left, where the plan had said that it fits
NO_REMEDY = "No other setting is enough: take more GPUs, a smaller max_length, or LoRA."


class Room(NamedTuple):
    """The memory that a rank has."""

    name: str  # whose, for a person
    memory: float | None  # bytes; None: not known
    is_cpu: bool = False


class Ranks(NamedTuple):
    """How many processes train."""

    num_ranks: int = 1
    ranks_per_node: int = 1


def find_room(config: Any, stated: str | None, num_local: int) -> Room:
    """The memory of the smallest GPU that the ranks of this node take; what the user has stated goes before it.

    Raises:
        UserError: what is stated is no size.
    """
    is_cpu = config.strategy.get("device") == "cpu" or not torch.cuda.is_available()
    if stated is not None:
        return stated_room(stated)._replace(is_cpu=is_cpu)
    if is_cpu:
        return Room("this machine", None, is_cpu)
    number = min(num_local, torch.cuda.device_count())
    found = [torch.cuda.get_device_properties(place) for place in range(number)]
    least = min(found, key=lambda properties: properties.total_memory)
    return Room(least.name, least.total_memory)


def stated_room(size: str) -> Room:
    """A GPU that need not be here, of a size such as 80GiB; UserError where it is none."""
    return Room("--gpu-memory", read_size(size))


def refuse(config: Any, room: Room, ranks: Ranks, *, force: bool) -> None:
    """Stop a run that cannot fit; with `force` say so and let it start. A plan that cannot be made stops nothing.

    Raises:
        UserError: what it needs, part by part, what there is, and the smallest change with which it fits.
    """
    if room.memory is None:
        return
    try:
        setup, mean = planned_setup(config, room, ranks)
        memory = memory_of(setup)
        if memory.peak.total <= room.memory:
            return
        text = (
            f"{room.name} has {size(room.memory)}, and the plan says that a rank needs "
            f"{size(memory.peak.total)} in the {memory.peak_phase}: {parts_in_words(memory)}. "
            f"{remedy_in_words(setup, work_of(setup, room, mean), room.memory)}"
        )
    except Exception as error:  # whatever the plan cannot do, training may
        logger.warning("no plan of this run's memory was made (%s)", first_line(error))
        return
    if not force:
        raise UserError(f"{text} `tuner plan` shows more; --force starts the run all the same.")
    logger.warning("%s It is started all the same, as --force says.", text)


def explain(config: Any, room: Room, ranks: Ranks, shortage: Shortage) -> str:
    """What was planned beside what was allocated where memory ran out, and the smallest change that helps."""
    lines = [f"Out of memory {shortage.place}: {shortage.problem}", f"  allocated: {shortage.allocated}"]
    try:
        setup, mean = planned_setup(config, room, ranks)
        memory = memory_of(setup)
        lines.append(f"  planned: {size(memory.peak.total)} at most, in the {memory.peak_phase}, of which")
        lines += [f"    {LABELS[name]:30} {size(value):>11}" for name, value in memory.peak._asdict().items() if value]
        limit = min(HELPS * memory.peak.total, room.memory or float("inf"))
        lines.append(remedy_in_words(setup, work_of(setup, room, mean), limit))
    except Exception as error:  # the shortage itself must be told in any case
        lines.append(f"  no plan of this run's memory was made ({first_line(error)})")
    return "\n".join(lines)


def planned_setup(config: Any, room: Room, ranks: Ranks) -> tuple[Setup, float]:
    """What each rank shall do, with packs as long as the documents that are there make them; their mean length."""
    setup, _ = read_setup(config, *ranks)
    lengths = lengths_of(config, setup.num_tokens)
    tokens = -(-lengths.longest_pack // setup.degrees.size) * setup.degrees.size
    return setup._replace(num_tokens=tokens, on_cpu=room.is_cpu), lengths.mean


def work_of(setup: Setup, room: Room, mean_length: float) -> Work:
    """The machine by which remedies are put in order: a GPU whose name is known, else an H100."""
    gpu: Gpu = next((gpu for name, gpu in GPUS.items() if name in room.name), GPUS["H100"])
    num_nodes = setup.num_ranks // setup.ranks_per_node
    return Work(gpu, read_link(None, gpu, num_nodes)[1], mean_length, EFFICIENCY)


def parts_in_words(memory: Memory) -> str:
    """The parts of a peak from the largest on; what is under a percent is left out."""
    parts = sorted(memory.peak._asdict().items(), key=lambda part: -part[1])
    shown = [f"{LABELS[name]} {size(value)}" for name, value in parts if value > memory.peak.total / 100]
    return ", ".join(shown)


def remedy_in_words(setup: Setup, work: Work, limit: float) -> str:
    """What to set."""
    remedy = find_remedy(setup, work, limit)
    if remedy is None:
        return NO_REMEDY
    return f"The smallest change that helps: {remedy.line()}, which needs {size(remedy.memory.peak.total)}."


def size(num_bytes: float) -> str:
    """For a person."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes > GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
