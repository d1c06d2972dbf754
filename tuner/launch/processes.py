"""The processes of one node: started with what tells each its rank, asked how they are, ended together."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tuner.failures import EXIT_INTERRUPTED, EXIT_SAVED, Failure, failure_path, read_failure, read_last_words
from tuner.launch.nodes import Place

KILL_SECONDS = 10.0  # for the system to end a killed process
CALM = (0, EXIT_SAVED)
LOOPBACK = ("lo", "lo0")


def log_path(log_dir: Path, rank: int) -> Path:
    """Where the output of a rank goes that is not the first."""
    return log_dir / f"rank_{rank}.log"


class Processes:
    """The ranks of this node. The first of all ranks speaks on our terminal, each other into a file of its own."""

    def __init__(self, place: Place, number: int, directory: Path, log_dir: Path) -> None:
        """For `number` ranks, which write what stops them into `directory`."""
        self.place, self.number = place, number
        self.directory, self.log_dir = directory, log_dir
        self._children: dict[int, subprocess.Popen] = {}
        self._ended: dict[int, float] = {}  # when that was seen

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start all of them; `environment` says what they have in common."""
        for local_rank in range(self.number):
            rank = self.place.first_rank + local_rank
            own = {**environment, **self.variables(local_rank)}
            out: IO[bytes] | None = None
            if rank > 0:
                out = log_path(self.log_dir, rank).open("ab")
            try:
                self._children[rank] = subprocess.Popen(
                    command,
                    env=own,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT if out else None,
                    start_new_session=True,  # the terminal's Ctrl-C comes from us, once
                )
            finally:
                if out is not None:
                    out.close()

    def variables(self, local_rank: int) -> dict[str, str]:
        """What tells a process which of all it is."""
        place = self.place
        return {
            "RANK": str(place.first_rank + local_rank),
            "WORLD_SIZE": str(place.num_ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.number),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port),
        }

    def codes(self) -> dict[int, int]:
        """The exit codes of those that have ended; negative for a signal."""
        codes = {rank: child.poll() for rank, child in self._children.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        for rank in ended:
            self._ended.setdefault(rank, time.time())
        return ended

    def all_ended(self) -> bool:
        """Whether none is left."""
        return len(self.codes()) == self.number

    def failures(self) -> list[Failure]:
        """What stopped ranks so far: their own words, or what their exit codes tell."""
        codes = self.codes()  # first: a rank writes before it ends
        found = []
        for rank in self._children:
            path = failure_path(self.directory, rank)
            if path.exists():
                found.append(read_failure(path.read_text(encoding="utf-8")))
            elif codes.get(rank, 0) not in CALM:
                found.append(self._obituary(rank, codes[rank]))
        return found

    def _obituary(self, rank: int, code: int) -> Failure:
        host = socket.gethostname()
        was_told = code in (-signal.SIGTERM, -signal.SIGINT, EXIT_INTERRUPTED, 128 + signal.SIGTERM)
        words = how_ended(code) + read_last_words(self.directory, rank)
        return Failure(rank, host, self._ended[rank], code if code > 0 else 128 - code, words, is_echo=was_told)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each that is still there, but not to the workers of its own."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(number)

    def end(self) -> None:
        """End them all at once, and whatever they have started: asked to, one would wait for a rank that is gone."""
        for child in self._children.values():
            try:
                os.killpg(child.pid, signal.SIGKILL)  # each leads a group, of data workers too
            except ProcessLookupError:
                continue
        self.wait(KILL_SECONDS)

    def wait(self, seconds: float) -> None:
        """Return when all have ended, or so many seconds have passed."""
        deadline = time.monotonic() + seconds
        while not self.all_ended() and time.monotonic() < deadline:
            time.sleep(0.02)


def how_ended(code: int) -> str:
    """What the exit code of a process that said nothing tells."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), most often by the system for lack of memory: see `dmesg`."
    if code < 0:
        return f"ended by the signal {signal.Signals(-code).name}, without a message."
    return f"ended with exit code {code}, without a message."


def no_address(host: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What lets gloo talk on one node whose own name leads nowhere, as in many containers."""
    names = {name for _, name in socket.if_nameindex()} & set(LOOPBACK)
    if host != "127.0.0.1" or "GLOO_SOCKET_IFNAME" in environment or not names:
        return {}
    return {"GLOO_SOCKET_IFNAME": names.pop()}
