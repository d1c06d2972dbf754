"""Other processes that may hang, flood or be endless: what they write is read with a deadline and a bound."""

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple

END_SECONDS = 5.0  # for the system to end a killed process
POLL_SECONDS = 0.05
Ending = Literal["done", "time", "size", "interrupt"]


class Written(NamedTuple):
    """What a process wrote, and why reading ended there."""

    data: bytes
    ending: Ending


def read_bounded(process: "subprocess.Popen[bytes]", *, seconds: float, max_bytes: int, line: bool = False) -> Written:
    """Read what a process writes until it ends, or, with `line`, until its line ends.

    Ctrl-C ends the reading, too. A process that is stopped for time or size is still there: see `end_group`.
    """
    found, deadline = bytearray(), time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            part = _read_part(process, min(deadline - time.monotonic(), POLL_SECONDS))
            found += part or b""
            if part == b"" or (line and found.endswith(b"\n")):
                return Written(bytes(found), "done")
            if len(found) > max_bytes:
                return Written(bytes(found[:max_bytes]), "size")
    except KeyboardInterrupt:
        return Written(bytes(found), "interrupt")
    return Written(bytes(found), "time")


def _read_part(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """What comes within so many seconds: empty at the end, None where nothing came."""
    assert process.stdout is not None
    has_ended = process.poll() is not None  # asked first: what it wrote before is there by now
    ready, _, _ = select.select([process.stdout], [], [], 0 if has_ended else max(seconds, 0))
    if ready:
        return os.read(process.stdout.fileno(), 1 << 16)
    return b"" if has_ended else None  # what it has started may hold the pipe open for ever


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Kill a process that leads a session, and whatever it has started that stayed in its group."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
