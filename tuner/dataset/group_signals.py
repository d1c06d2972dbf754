"""Signals that whole groups of processes get: those that work for another leave the answer to it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""what asks a run to save and end; Ctrl-C, SLURM and many a shell send it to all processes of a run at once"""


def is_nohup(number: signal.Signals) -> bool:
    """Whether this process was told (`nohup`) to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def held_back() -> Iterator[None]:
    """Stop signals wait for the end of the block; a process started meanwhile begins, and stays, without them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int = 0) -> None:
    """Let this process outlive stop signals of others than its parent, which needs it to save and then ends it.

    Call it in a worker's main thread before there are others; `worker` is the number that torch gives its own.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_wait_for, args=(os.getppid(),), name="signals", daemon=True).start()


def _wait_for(parent: int) -> None:
    sender = 0
    while sender != parent:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    os._exit(128 + signal.SIGTERM)
