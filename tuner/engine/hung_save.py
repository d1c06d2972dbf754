"""A checkpoint whose writing stands still, as where a disk hangs: which rank, which step, where it is, and an end."""

import math
import threading

from tuner.engine.pending_save import WAITS, PendingSave
from tuner.engine.progress import Progress
from tuner.engine.watch import LONG_FACTOR, Patience, end, innermost_line
from tuner.engine.world import World
from tuner.errors import LostRankError
from tuner.failures import where

SLOWEST_DISK = 20e6
"""bytes a second that a disk writes at least; a checkpoint of all ranks has as much time on top of the timeout"""


def seconds_for(num_bytes: int, timeout: float) -> float:
    """How long each part of a save of so many bytes may take.

    That is a little more than ranks wait for each other: where they do, they say it first, with the documents.
    """
    return LONG_FACTOR * timeout + Patience(timeout).silence + num_bytes / SLOWEST_DISK


def watch_save(pending: PendingSave, world: World, progress: Progress, *, timeout: float) -> None:
    """A thread that ends this process with a `LostRankError` where a part of the save takes too long.

    Nobody else would see it: training goes on beside a writer that hangs, up to the next save, and a process that is
    alone waits for it for ever.

    Args:
        pending: the save that has begun.
        world: this rank.
        progress: where training is meanwhile.
        timeout: seconds, `rank_timeout` of the run.
    """
    threading.Thread(target=_judge, args=(pending, world, progress, timeout), daemon=True).start()


def _judge(pending: PendingSave, world: World, progress: Progress, timeout: float) -> None:
    tick, limit = Patience(timeout).between_beats, seconds_for(pending.num_bytes, timeout)
    part, ticks = pending.part, 0  # not the clock: a job that was suspended has its time anew
    while not pending.wait(tick):
        ticks = ticks + 1 if pending.part == part else 0
        part = pending.part
        patience = limit + timeout if part.startswith(WAITS) else limit  # the rank that hangs shall say so itself
        if ticks > math.ceil(patience / tick):
            end(LostRankError(_message(pending, world, progress, ticks * tick, timeout)))


def _message(pending: PendingSave, world: World, progress: Progress, seconds: float, timeout: float) -> str:
    place = progress.place
    line = innermost_line(pending.thread_id)
    return (
        f"Rank {world.rank} hangs in saving step {pending.step}: its writer {pending.part} for {seconds:.0f} s"
        + (f", at {line}" if line else "")
        + f".\n  The files go to {pending.path.parent}. Does that disk answer? Training was {where(*place[1:3])}.\n"
        f"  A save of {pending.num_bytes / 1e9:.2f} GB has {seconds_for(pending.num_bytes, timeout):.0f} s for each "
        f"part; rank_timeout is {timeout:g} s. What was saved before is whole: go on with --resume auto."
    )
