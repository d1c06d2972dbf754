"""Where this process is in its run: step, phase and documents, and for how long it computed nothing there."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tuner.failures import last_words

START, DATA, COMPUTE, SUM = "start", "data", "forward and backward", "gradient sum"
UPDATE, HOOKS, CHECKPOINT = "optimizer step", "hooks", "checkpoint"
LONG = (START, HOOKS, CHECKPOINT)
"""phases that may take many times as long as a step does"""
TRAINING = (COMPUTE, SUM, UPDATE)


class Place(NamedTuple):
    """Where a process is. All ranks enter the same phases, so that of two the one of the lower number is behind."""

    number: int  # of phases entered so far
    step: int  # counted from 1; 0 before the first
    phase: str
    since: float  # by time.monotonic()
    is_first_step: bool = False


class Progress:
    """The place of this process; entering a phase costs microseconds."""

    def __init__(self) -> None:
        self.place = Place(0, 0, START, time.monotonic())
        self.data_seconds = 0.0  # of the last step: waited for its batches
        self.documents: Sequence[str] = ()  # the first few of the step's, for whoever asks why this process is gone
        self._first_step = 0
        self._idle_seconds = 0.0
        self._save_seconds = 0.0
        self._entered = (time.perf_counter(), time.thread_time())
        self._file: int | None = None

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Say that a phase begins, one of this module's names, and with a step's number (from 1) that this one does."""
        self._count()
        before = self.place
        if step is None:
            step = before.step
        else:
            self.documents = ()
        self._first_step = self._first_step or step
        is_first_step = step == self._first_step > 0
        self.place = Place(before.number + 1, step, phase, time.monotonic(), is_first_step)
        if self._file is not None:
            os.pwrite(self._file, last_words(step, phase, self.documents), 0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in a phase, then again in the one before."""
        before = self.place.phase
        self.enter(phase)
        yield
        self.enter(before)

    def take_idle_seconds(self) -> float:
        """For how long, since the last call, training steps ran and this thread had nothing to do or no core to do it.

        Data and hooks are left out. Where the CPU computes, that is the time lost to waiting for other ranks and for
        what they send; where a GPU does, it says nothing.
        """
        self._count()
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds

    def take_save_seconds(self) -> float:
        """For how long, since the last call, training was held by checkpoints."""
        seconds, self._save_seconds = self._save_seconds, 0.0
        return seconds

    def write_to(self, path: Path) -> None:
        """Keep in this file where the process is, for when it is killed."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(self._file, last_words(self.place.step, self.place.phase, ()), 0)

    def _count(self) -> None:
        (wall, cpu), self._entered = self._entered, (time.perf_counter(), time.thread_time())
        if self.place.phase == DATA:
            self.data_seconds = self._entered[0] - wall
        if self.place.phase == CHECKPOINT:
            self._save_seconds += self._entered[0] - wall
        if self.place.phase in TRAINING:
            self._idle_seconds += max(0.0, self._entered[0] - wall - (self._entered[1] - cpu))
