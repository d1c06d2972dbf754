"""All ways to hold a setup on some GPUs that fit, and of those only the ones that no other beats in memory and time."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from tuner.model.checkpointing import ATTENTION
from tuner.model.checkpointing import Choice as Recomputed
from tuner.parallel.mesh import Degrees, head_counts, legal_degrees
from tuner.plan.gpus import Gpu
from tuner.plan.holding import Held, Sizes, count, hold
from tuner.plan.memory import CONTEXT, Memory, memory_of
from tuner.plan.settings import line
from tuner.plan.setup import Setup
from tuner.plan.speed import Speed, speed_of
from tuner.plan.trace import of_attention, of_layer_input

SPREAD = ("none", "zero1", "zero2", "zero3", "fsdp", "zero2_offload", "zero3_offload")
AGAIN: tuple[Recomputed, ...] = (True, ATTENTION, False)  # what gradient checkpointing may compute again
KEPT = [(again, offload) for again in AGAIN for offload in (False, True) if again or not offload]
RINGS = (2, 4, 8)  # ranks in a ring, beyond those among which heads are divided
LONGER = (1, 2, 4)  # micro-batches of so many times the tokens


class Work(NamedTuple):
    """What a step shall do, on what; the same for all ways to do it."""

    gpu: Gpu
    link: float  # bytes/s that a rank sends
    mean_length: float  # sum of squared document lengths over sum of lengths: that of the document of a mean token
    efficiency: float  # share of the GPU's matrix rate


class Choice(NamedTuple):
    """One way."""

    setup: Setup
    memory: Memory
    speed: Speed
    seconds: float  # of a step
    origin: Setup

    def line(self) -> str:
        """The settings to paste."""
        return line(self.setup, self.origin)


def candidates(setup: Setup) -> Iterator[Setup]:
    """The ways to look at; the tokens of a step stay as many where they divide. A micro-batch is a pack."""
    packs = setup.num_accumulation_steps * setup.num_ranks // setup.degrees.size
    others_hold = setup.num_ranks > 1 and setup.lora is None and setup.optimizer == "adamw"
    holdings = [name for name in (SPREAD if others_hold else ("none",)) if not setup.in_backward or name in ALONE]
    for degrees, longer in product(sharings(setup), LONGER):
        step = setup.num_ranks // degrees.size * longer
        if packs % step or (longer > 1 and setup.in_backward):
            continue
        for holding, (again, offload) in product(holdings, KEPT):
            yield setup._replace(
                degrees=degrees,
                num_tokens=-(-setup.num_tokens * longer // degrees.size) * degrees.size,
                holding=holding,
                checkpointing=again,
                offload_activations=offload,
                num_accumulation_steps=packs // step,
                hybrid=False,
                hpz_size=None,
            )


ALONE = ("none", "fsdp")
"""who lets the optimizer step in backward"""


def sharings(setup: Setup) -> list[Degrees]:
    """How sequences may be cut: over heads, and where all heads are taken in a ring around them."""
    sizes = legal_degrees(*head_counts(setup.model.get_text_config()))
    found = [Degrees(size) for size in sizes] + [Degrees(sizes[-1], ring) for ring in RINGS]
    kv_heads = head_counts(setup.model.get_text_config())[1]
    found += [Degrees(kv_heads, ring) for ring in RINGS if kv_heads in sizes[:-1]]
    return [degrees for degrees in found if setup.num_ranks % degrees.size == 0]


def solve(setup: Setup, work: Work) -> list[Choice]:
    """The choices that fit and that no other beats in both memory and time, fastest first.

    Seconds are arithmetic and memory is traced, so that what is slower than a choice is traced only where it may
    need less.
    """
    sizes = count(setup)  # the same for all
    timed = []
    for each in candidates(setup):
        speed = speed_of(each, sizes, work.gpu, work.link, work.mean_length, work.efficiency)
        timed.append((speed.seconds, each, speed))
    # of equally fast ones first those that are likely to need least
    timed.sort(key=lambda entry: (entry[0], at_least(entry[1], sizes), own_tokens(entry[1])))
    best: list[Choice] = []
    seen: list[Setup] = []
    for seconds, each, speed in timed:
        limit = best[-1].memory.peak.total if best else work.gpu.memory
        if at_least(each, sizes) >= limit or any(needs_no_more(other, each) for other in seen):
            continue
        seen.append(each)
        memory = memory_of(each, sizes)
        if memory.peak.total >= limit:
            continue
        if best and seconds == best[-1].seconds:
            best.pop()
        best.append(Choice(each, memory, speed, seconds, setup))
    return best


def own_tokens(setup: Setup) -> int:
    """Of a pack, those that are on a rank."""
    return setup.num_tokens // setup.degrees.size


def needs_no_more(one: Setup, other: Setup) -> bool:
    """Whether `one` surely needs no more memory: held in the same way, it keeps less or has fewer tokens on a rank."""
    if one.holding != other.holding or one.offload_activations < other.offload_activations:
        return False
    if one.checkpointing not in AGAIN or other.checkpointing not in AGAIN or one.tile_tokens != other.tile_tokens:
        return False
    if AGAIN.index(one.checkpointing) > AGAIN.index(other.checkpointing):
        return False
    if one.degrees == other.degrees:
        return one.num_tokens <= other.num_tokens
    if one.needles is not None and one.degrees.size < other.degrees.size:
        return False
    return 2 * own_tokens(one) <= own_tokens(other) and one.degrees.ring == 1


def at_least(setup: Setup, sizes: Sizes) -> float:
    """Bytes below which no trace can come: what is held, with inputs of layers or what attention keeps."""
    held: Held = hold(setup, sizes)
    always, computation = held.weights + held.optimizer, setup.computation()
    layers = 0 if setup.offload_activations else setup.model.get_text_config().num_hidden_layers
    kept = of_layer_input(computation) + (of_attention(computation) if setup.checkpointing is not True else 0)
    is_there = held.is_static or setup.num_accumulation_steps > 1
    forward = held.gathered + layers * kept + (held.gradient if is_there else 0.0)
    always += 0.0 if setup.on_cpu else CONTEXT
    return always + max(forward, held.gradient + max(0.0, held.updating))
