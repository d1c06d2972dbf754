"""What the needle passes of a run take beside its steps: a forward without gradients every so many of them."""

from typing import Any, NamedTuple

from tuner.dataset.needle_grid import NeedleGrid
from tuner.engine.assemble import Assembly
from tuner.engine.hooks import NeedleHook
from tuner.engine.scoring import packs
from tuner.method.loss import CHUNK_TOKENS
from tuner.model.flops import Matmuls, attention_flops
from tuner.parallel.mesh import Degrees

ANSWER_TOKENS = 8  # of a needle at most: six digits, and what begins them
PACK_TOKENS = 16384  # of a `NeedleHook` that is told nothing else


class Passes(NamedTuple):
    """The documents that are scored each time, as ranks take them."""

    interval: int  # steps
    packs: tuple[tuple[int, ...], ...]  # tokens of the documents of each
    num_needles: int = 1

    @property
    def num_tokens(self) -> int:
        """Of the longest pack."""
        return max(map(sum, self.packs))

    @property
    def num_scored(self) -> int:
        """Labels of a pack at most, of which as many have logits at a time."""
        return min(CHUNK_TOKENS, self.num_tokens, ANSWER_TOKENS * self.num_needles * max(map(len, self.packs)))


def passes_of(config: Any) -> Passes | None:
    """Those of a loaded config; None where there are none, or needles that are not ours: their sizes are not known."""
    for hook in config.get("custom_hooks") or ():
        if hook.get("type") is not NeedleHook or not hook.get("interval"):
            continue
        node = hook.get("needles")
        if node is not None and node.get("type") is not NeedleGrid:
            continue
        grid: NeedleGrid = NeedleGrid() if node is None else Assembly(config).build(node)
        lengths = [cell.length for cell in grid.cells()]
        found = packs(lengths, hook.get("pack_tokens", PACK_TOKENS))
        return Passes(hook["interval"], tuple(tuple(lengths[n] for n in pack) for pack in found), grid.num_needles)
    return None


def flops_of_turns(passes: Passes, matmuls: Matmuls, num_ranks: int, degrees: Degrees) -> float:
    """FLOPs of a rank in all of its forwards, beside the ranks with the longest packs, for which the others wait.

    Ranks that share a sequence share the work of a pack; whoever has no pack of a turn computes with the others all the
    same. Heads are multiplied with answers alone, which is left out.
    """
    num_places = num_ranks // degrees.size
    costs = [
        2.0 * matmuls.layers * sum(pack) + attention_flops(matmuls, sum(pack), sum(size**2 for size in pack))
        for pack in passes.packs
    ]
    turns = [max(costs[first : first + num_places]) for first in range(0, len(costs), num_places)]
    return sum(turns) / degrees.size
