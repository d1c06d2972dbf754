"""How a run is asked to end after its step: by a signal to this process, or by a file in the work dir."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tuner.dataset.group_signals import STOP_SIGNALS, is_nohup
from tuner.engine.tally import Tally
from tuner.engine.world import World

STOP_FILE = "stop"
"""`touch WORK_DIR/stop` is a wish like a signal; whoever obeys it removes it"""
BY_FILE = 255  # where a signal's number would be
SAME_SECONDS = 1.0
"""a signal sooner after the first one is that one again: SLURM tells the ranks, too, what their launcher passes on"""


class Stop:
    """The wish that reached this process; ranks share theirs in the facts of each step, so that all end after one.

    The second signal ends the process at once, also where its main thread is in a call that does not return: signals
    are read by a thread, from the descriptor that Python's own handler writes them to.
    """

    def __init__(self, work_dir: Path, world: World) -> None:
        self.file = work_dir / STOP_FILE
        self.world = world
        self._number = 0  # of the first signal
        self._seconds = 0.0  # when it came

    def asked(self) -> int:
        """A signal's number, `BY_FILE`, or 0; only the first rank looks for the file."""
        if self._number:
            return self._number
        return BY_FILE if self.world.is_first and self.file.exists() else 0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take stop signals in place of what they do elsewhere.

        After one of them they stay without effect: all is saved by then, and a launcher may pass on one that this
        process has had already. In another thread than the main one there is nothing to take.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, signals = socket.socketpair()
        signals.setblocking(False)
        wakeup = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        numbers = [number for number in STOP_SIGNALS if not is_nohup(number)]
        before = {number: signal.signal(number, do_nothing) for number in numbers}
        listener = threading.Thread(target=self._listen, args=(ours,), name="stop", daemon=True)
        listener.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._number else handler or signal.SIG_DFL)
            signal.set_wakeup_fd(wakeup)
            ours.shutdown(socket.SHUT_RDWR)  # which ends the listener; data workers hold copies of both ends open
            listener.join()
            ours.close()
            signals.close()

    def _listen(self, signals: socket.socket) -> None:
        while received := signals.recv(1):
            if received[0] in STOP_SIGNALS:
                self._take(signal.Signals(received[0]))

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._seconds = number, now
            say(f"{number.name}: the step under way is ended and saved; the signal again ends at once")
        elif now - self._seconds > SAME_SECONDS:
            say(f"{number.name} again: ended at once")
            sys.stdout.flush()
            os._exit(128 + number)


def do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that there is one: Python then writes the signal's number to the wakeup descriptor."""


def say(text: str) -> None:
    """A line for whoever watches."""
    print(f"tuner: {text}", file=sys.stderr, flush=True)


def reason(tally: Tally, stop: Stop) -> str:
    """Who wished the end, for a person."""
    if tally.stop == BY_FILE:
        return f"by {stop.file}"
    whose = f" to rank {tally.stop_rank}" if stop.world.size > 1 else ""
    return f"by {signal.Signals(tally.stop).name}{whose}"
