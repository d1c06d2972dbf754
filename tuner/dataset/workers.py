"""A map over many processes whose results come in order and whose memory is bounded."""

import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from tuner.dataset.group_signals import held_back, obey_parent_only
from tuner.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

GONE = (EOFError, OSError)  # what a pipe raises whose other end is gone, maybe in the middle of a message
WINDOW = 4  # items per worker that may be under way or wait for their turn


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def travels(function: Callable[..., object], doing: str) -> bool:
    """Whether `function` can be sent to other processes; where a user's part of it cannot, a warning names `doing`."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{doing} on one core, since the data_format function cannot be sent to others ({error}). "
            "Define it at the top level of a module.",
            stacklevel=2,
        )
        return False
    return True


def progress_interval() -> float:
    """Seconds between two states of a progress bar: few of them in a log file."""
    return 0.5 if sys.stderr.isatty() else 15.0


class Workers(Generic[Item, Result]):
    """One function on `num_workers` processes, or in this one if that is 1; the results are the same.

    Each process is at the far end of a pipe and has one item at a time. They are spawned: they import the function's
    module and the main script, nothing else, and leave when this process is gone.
    """

    def __init__(self, function: Callable[[Item], Result], *, num_workers: int) -> None:
        self._function, self._num_workers = function, num_workers
        self._processes: list[Any] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}

    def __enter__(self) -> "Workers[Item, Result]":
        context = multiprocessing.get_context("spawn")
        for _ in range(self._num_workers if self._num_workers > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            resource_tracker.ensure_running()  # the first start would do it, and unblock Ctrl-C
            with held_back():  # stop signals are for this process, whose end ends the workers
                process.start()
            theirs.close()  # so that a worker's death shows as the end of our pipe
            self._processes.append(process)
            self._idle.append(ours)
        try:
            for connection in self._idle:  # not as an argument: that would wait for ever on a worker that is gone
                connection.send(self._function)
        except ConnectionError as death:
            problem = self._obituary()
            self.__exit__()
            raise problem from death
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The function of each item, in order, lazily. Raises what the function raises."""
        if not self._processes:
            return map(self._function, items)
        return self._map(iter(items))

    def _map(self, items: Iterator[Item]) -> Iterator[Result]:
        done: dict[int, Result] = {}
        sent = given = 0
        exhausted = False
        while not exhausted or given < sent:
            while not exhausted and self._idle and sent - given < WINDOW * self._num_workers:
                exhausted = not self._send(sent, items)
                sent += not exhausted
            if self._busy:
                done.update(self._receive())
            while given in done:
                yield done.pop(given)
                given += 1

    def _send(self, number: int, items: Iterator[Item]) -> bool:
        for item in items:
            connection = self._idle.pop()
            self._busy[connection] = number
            try:
                connection.send(item)
            except ConnectionError as death:
                raise self._obituary() from death
            return True
        return False

    def _receive(self) -> dict[int, Result]:
        received = {}
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result, error = connection.recv()
            except GONE as death:
                raise self._obituary() from death
            if error is not None:
                raise error
            received[self._busy.pop(connection)] = result
            self._idle.append(connection)
        return received

    def _obituary(self) -> UserError:
        """What to say of a worker that is gone."""
        for process in self._processes:
            process.join(timeout=1)
        codes = sorted({process.exitcode for process in self._processes if process.exitcode})
        return UserError(
            f"A worker process ended early (exit codes {codes}). -9 means killed, often for lack of memory: "
            "`taskset -c 0 tuner ...` works with one process instead of one for each core. "
            '1 at the start often means a script without `if __name__ == "__main__":` around its work.'
        )


def _work(connection: Connection) -> None:
    obey_parent_only()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        function = connection.recv()
    except GONE:
        return
    while True:
        try:
            item = connection.recv()
        except GONE:
            return
        try:
            answer: tuple[Any, Exception | None] = (function(item), None)
        except UserError as error:
            answer = (None, error)
        except Exception as error:  # one of ours: its traceback would not survive the journey by itself
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = (None, RuntimeError(f"{told} (in a worker process)\n{traceback.format_exc()}"))
        try:
            connection.send(answer)
        except ConnectionError:
            return
