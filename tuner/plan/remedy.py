"""The smallest change to the settings of a run with which it fits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tuner.plan.holding import count
from tuner.plan.memory import Memory, memory_of
from tuner.plan.settings import assignments, changes, is_rounding
from tuner.plan.setup import Setup
from tuner.plan.solve import Work, at_least, candidates, needs_no_more
from tuner.plan.speed import speed_of

TILES = (8192, 2048)  # tokens that feed-forward blocks may take at a time
FOLLOWS = "num_accumulation_steps"  # what keeps a step the same where more ranks share a sequence


class Remedy(NamedTuple):
    """Settings that differ from those of a run, and what it takes with them."""

    settings: dict[str, Any]
    memory: Memory

    def line(self) -> str:
        """To paste behind the command."""
        return assignments(self.settings)


def find_remedy(setup: Setup, work: Work, limit: float) -> Remedy | None:
    """The fewest settings with which a rank's peak is at most `limit` bytes, the fastest of as few; None: none are."""
    sizes = count(setup)
    found: list[tuple[int, float, int, Setup, dict[str, Any]]] = []
    for each in others(setup):
        changed = changes(each, setup)
        seconds = speed_of(each, sizes, *work).seconds
        found.append((len(set(changed) - {FOLLOWS}), seconds, len(found), each, changed))
    seen: list[Setup] = []
    for _, _, _, each, changed in sorted(found, key=lambda entry: entry[:3]):
        if at_least(each, sizes) > limit or any(needs_no_more(other, each) for other in seen):
            continue
        memory = memory_of(each, sizes)
        if memory.peak.total <= limit:
            return Remedy(changed, memory)
        seen.append(each)
    return None


def others(setup: Setup) -> Iterator[Setup]:
    """What may be changed without another result of training; on a CPU nothing is offloaded: it is there."""
    tiles = [setup.tile_tokens, *(size for size in TILES if setup.tile_tokens is None or size < setup.tile_tokens)]
    for size in tiles:
        tiled = setup._replace(tile_tokens=size)
        if size != setup.tile_tokens:
            yield tiled
        for each in candidates(tiled):
            is_offloaded = each.offload_activations or each.holding.endswith("_offload")
            if is_rounding(each, setup) and changes(each, setup) and not (setup.on_cpu and is_offloaded):
                yield each
