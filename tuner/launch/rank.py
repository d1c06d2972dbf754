"""A process that is one of several: what its launcher tells it, and where what it prints goes."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tuner.failures import LAUNCH_DIR

RUN_FILE = "run.json"
WATCH_SECONDS = 1.0
ORPHAN_SECONDS = 600.0  # to save and leave once the launcher is gone


class Told(NamedTuple):
    """What our launcher tells a rank: the rendered config, what to resume from, and the launcher's process id."""

    source: str
    resume: str | None
    launcher: int


def write_run(directory: Path, source: str, resume: str | None) -> None:
    """Write what the ranks of this process are told."""
    told = Told(source, resume, os.getpid())
    (directory / RUN_FILE).write_text(json.dumps(told._asdict()), encoding="utf-8")


def read_run(environment: Mapping[str, str] = os.environ) -> Told | None:
    """What our launcher tells this process; None for a process that it has not started."""
    if LAUNCH_DIR not in environment:
        return None
    return Told(**json.loads((Path(environment[LAUNCH_DIR]) / RUN_FILE).read_text(encoding="utf-8")))


def leave_with(launcher: int) -> None:
    """End this process when its launcher is gone, which then could not end it any more."""
    threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # our launcher has made each rank the leader of a group


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Send all that this process and its libraries print to the end of a file; an exception leaves to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(stream.fileno()) for stream in streams]
    with path.open("ab") as file:
        for stream in streams:
            os.dup2(file.fileno(), stream.fileno())
    try:
        yield
    finally:
        for stream, descriptor in zip(streams, kept):
            stream.flush()
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)
