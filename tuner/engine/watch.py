"""Ranks that wait too long for one that does not come: who it is, where it is, which documents it has, and an end."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from tuner.engine.checkpoint import write_text_atomically
from tuner.engine.progress import LONG, Place, Progress
from tuner.engine.world import World, in_ranges, meeting_place
from tuner.errors import LostRankError
from tuner.failures import LAUNCH_DIR, exit_code, place_path, tell, where

LONG_FACTOR = 2
"""as many times the timeout may start, first step, hooks and checkpoints of a rank that lives take"""
ANSWER_SECONDS = 3.0  # for a data set to say which documents a rank has; it may be what hangs
NUM_SHOWN = 8  # documents in the message
Documents = Callable[[int, int], list[str]]
"""(step counted from 0, rank) -> the ids of what it has in that step"""


class Beat(NamedTuple):
    """What a rank tells the others of itself, again and again."""

    turn: int  # the number of this beat: where it stands still, so does the process
    number: int  # of phases entered
    step: int
    phase: str
    num_calls: int  # to other ranks, begun so far
    is_slow: bool  # in what may take many times as long as a step
    line: str  # of code, where this rank has been for long
    has_left: bool = False

    @property
    def position(self) -> tuple[int, int]:
        """Of ranks that do the same, the lowest is behind."""
        return self.number, self.num_calls


class Seen(NamedTuple):
    """A rank's last beat, None where none has come, and for how long no other came."""

    beat: Beat | None
    silent_seconds: float


class Lost(NamedTuple):
    """The ranks that the others wait for, and why that is said of them."""

    ranks: list[int]
    reason: str
    live: bool = True  # what they said of themselves still holds


class Patience(NamedTuple):
    """How long what may take; all follow from the timeout, in seconds."""

    timeout: float

    @property
    def between_beats(self) -> float:
        """Often enough for a short timeout, seldom enough for a thousand ranks."""
        return min(max(self.timeout / 20, 0.05), 5.0)

    @property
    def silence(self) -> float:
        """After which a process that does not beat is stopped, dead or cut off."""
        return min(max(self.timeout / 4, 0.5), 60.0)

    @property
    def of_groups(self) -> float:
        """The process groups' own timeout: the last resort, for its message names nobody."""
        return self.timeout * (LONG_FACTOR + 1)


def find_lost(seen: Mapping[int, Seen], waited: float, patience: Patience) -> Lost | None:
    """Whom the ranks wait for, once one of them has waited for `waited` seconds; None while there is still hope.

    A process that gives no sign of life is lost whatever it did. One that lives may be slow: it has the timeout, or
    `LONG_FACTOR` times that in what may take long.
    """
    if waited <= patience.timeout:
        return None
    present = {rank: one for rank, one in seen.items() if one.beat is None or not one.beat.has_left}
    silent = [rank for rank, one in present.items() if one.silent_seconds > patience.silence]
    if silent:
        return Lost(silent, "gives no sign of life: stopped, out of memory, or its node or network is gone", live=False)
    beats = {rank: one.beat for rank, one in present.items() if one.beat is not None}
    last = min(beat.position for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.position == last]
    if any(beats[rank].is_slow for rank in behind) and waited <= patience.timeout * LONG_FACTOR:
        return None
    if len(behind) == len(beats):
        return Lost(behind, "waits for the others, which are no further: what they send does not arrive")
    return Lost(behind, "lives, but does not come to where the others wait for it")


class Watch:
    """Two threads beside the one that trains: one tells and asks the others, one judges, even while a store hangs."""

    def __init__(
        self,
        world: World,
        progress: Progress,
        store: dist.Store,
        *,
        timeout: float,
        documents: Documents,
        work_dir: Path,
    ) -> None:
        """Watch over the thread that calls this; `store` is used by nobody else, for its client takes turns."""
        self.world, self.progress, self.store = world, progress, store
        self.patience = Patience(timeout)
        self.documents, self.work_dir = documents, work_dir
        self._trainer = threading.get_ident()
        self._ended = threading.Event()
        self._turn = 0
        self._changed: dict[int, tuple[Beat | None, float]] = {}  # the others' last beats, and when those came
        self._answered = time.monotonic()  # when the store last did
        self._lengthened: set[dist.ProcessGroup] = set()
        self._woken = 0.0  # when this process went on after it had been stopped

    def start(self) -> None:
        """Begin."""
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._tell, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self, *, has_left: bool) -> None:
        """End; `has_left` tells the others that this rank is done, and that none waits for it."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.patience.between_beats)
        if has_left and not self._threads[0].is_alive():
            try:
                self._beat(has_left=True)
            except dist.DistError:
                return  # the rank that held the store was done before this one

    def _tell(self) -> None:
        while not self._ended.wait(self.patience.between_beats):
            try:
                self._beat()
                self._lengthen()
                if self._waited() > self.patience.timeout / 2:
                    self._ask()
                self._answered = time.monotonic()
            except dist.DistError:
                return  # and judge by that

    def _judge(self) -> None:
        seen = time.monotonic()
        while not self._ended.wait(self.patience.between_beats):
            now = time.monotonic()
            if now - seen > self.patience.silence:
                self._woken = now  # a suspended job goes on: nobody was late meanwhile
            seen = now
            lost = self._find()
            if lost is not None:
                end(LostRankError(self._message(lost)))

    def _lengthen(self) -> None:
        """Let no process group speak first: libraries make them with a timeout of 10 minutes, and name nobody."""
        timeout = timedelta(seconds=self.patience.of_groups)
        for group in set(groups()) - self._lengthened:
            dist.distributed_c10d._set_pg_timeout(timeout, group)
            self._lengthened.add(group)

    def _waited(self) -> float:
        return time.monotonic() - max(self.progress.place.since, self._woken)

    def _beat(self, *, has_left: bool = False) -> None:
        self._turn += 1
        place = self.progress.place
        line = innermost_line(self._trainer) if self._waited() > self.patience.timeout / 2 else ""
        beat = Beat(
            self._turn, place.number, place.step, place.phase, num_calls(), is_slow(place), line, has_left
        )  # fmt: skip
        self._changed[self.world.rank] = beat, time.monotonic()
        self.store.set(beat_key(self.world.rank), json.dumps(beat))

    def _ask(self) -> None:
        for rank in range(self.world.size):
            key = beat_key(rank)
            beat = Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None
            if rank not in self._changed or self._changed[rank][0] != beat:
                self._changed[rank] = beat, time.monotonic()

    def _find(self) -> Lost | None:
        now, changed = time.monotonic(), dict(self._changed)
        waited = self._waited()
        if waited > self.patience.timeout and now - max(self._answered, self._woken) > self.patience.silence:
            return Lost([], "The store of the first node, where ranks find each other, does not answer", live=False)
        if len(changed) < self.world.size:
            return None  # not asked yet
        seen = {rank: Seen(beat, now - max(at, self._woken)) for rank, (beat, at) in changed.items()}
        return find_lost(seen, waited, self.patience)

    def _message(self, lost: Lost) -> str:
        """Who is lost, where, with which documents, and who says so."""
        place = self.progress.place
        beats = {rank: self._changed[rank][0] for rank in lost.ranks}
        steps = [beat.step for beat in beats.values() if beat is not None]
        # a rank that is silent may have come further than it said: it is missed here
        step = min(steps) if lost.live and steps else place.step
        names = f"Rank{'s' * (len(lost.ranks) > 1)} {in_ranges(lost.ranks)}: " if lost.ranks else ""
        places = [f"rank {rank} {described(beat)}" for rank, beat in list(beats.items())[:NUM_SHOWN]]
        text = (
            f"{names}{lost.reason}.\n  Last seen: {'; '.join(places) or 'nobody'}.\n  Rank {self.world.rank} has been "
            f"{where(place.step, place.phase)} for {self._waited():.0f} s; rank_timeout is {self.patience.timeout:g} s"
            ".\n"
        )
        return text + self._documents_text(lost.ranks or list(range(self.world.size)), step)

    def _documents_text(self, ranks: list[int], step: int) -> str:
        """The documents of the lost ranks in the step they are in, all of them in a file."""
        if step < 1:
            return "  No step had begun."
        found: dict[str, list[str]] = {}
        finder = threading.Thread(target=lambda: found.update(self._of_ranks(ranks, step)), daemon=True)
        finder.start()
        finder.join(ANSWER_SECONDS)
        ids = [document for own in found.values() for document in own]
        if not ids:
            return f"  Which documents step {step} has is not known: the data did not answer."
        path = self.work_dir / f"lost_rank_step_{step}.json"
        shown = ", ".join(ids[:NUM_SHOWN]) + (f" and {len(ids) - NUM_SHOWN} more" if len(ids) > NUM_SHOWN else "")
        try:
            write_text_atomically(path, json.dumps({"step": step, "documents": found}, ensure_ascii=False) + "\n")
        except OSError as error:
            if not path.exists():  # another rank writes the same
                return f"  Documents of step {step}: {shown}. The list could not be written: {error}."
        return f"  Documents of step {step}: {shown}; all are listed in {path}."

    def _of_ranks(self, ranks: list[int], step: int) -> dict[str, list[str]]:
        return {f"rank {rank}": self.documents(step - 1, rank) for rank in ranks}


def beat_key(rank: int) -> str:
    """Under which a rank's beat is in the store."""
    return f"beat_{rank}"


def is_slow(place: Place) -> bool:
    """Whether a rank there may take many times as long as for a step."""
    return place.phase in LONG or place.is_first_step


def described(beat: Beat | None) -> str:
    """Where a rank was, for a person."""
    if beat is None:
        return "never said anything"
    return where(beat.step, beat.phase) + (f" at {beat.line}" if beat.line else "")


def groups() -> list[dist.ProcessGroup]:
    """All that this process is in."""
    return list(dist.distributed_c10d._world.pg_map)


def num_calls() -> int:
    """How often this process has begun to exchange something with others, in all of its groups together."""
    return sum(group._get_sequence_number_for_group() for group in groups())


def innermost_line(thread: int) -> str:
    """The line of code that a thread is at."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def end(error: LostRankError) -> None:
    """Say it, and end this process at once: its main thread is in a call that does not return."""
    tell(error, debug=False)
    sys.stdout.flush()
    os._exit(exit_code(error))


@contextmanager
def watched(
    world: World, progress: Progress, *, timeout: float, documents: Documents, work_dir: Path
) -> Iterator[None]:
    """Let ranks that wait for longer than `timeout` seconds end with a message on whom they wait for.

    Call it within `joined`. A process alone waits for nobody; under our launcher it too says where it is, for when it
    is killed.
    """
    if LAUNCH_DIR in os.environ:
        progress.write_to(place_path(Path(os.environ[LAUNCH_DIR]), world.rank))
    if world.size == 1:
        yield
        return
    store = meeting_place(world)
    watch = Watch(world, progress, store, timeout=timeout, documents=documents, work_dir=work_dir)
    watch.start()
    has_left = False
    try:
        yield
        has_left = True
    finally:
        watch.stop(has_left=has_left)
