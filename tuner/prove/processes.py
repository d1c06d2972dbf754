"""A function on several gloo processes of this machine, and what each of them returns."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tuner.errors import UserError

STARTING = 120  # seconds that the imports of all processes may take on a busy machine


class Answer(NamedTuple):
    """What a process sends: a result, or what stopped it; a mistake of the user is the words alone."""

    seconds: float  # since the epoch
    result: Any = None
    mistake: str | None = None
    trace: str | None = None


class ProcessError(RuntimeError):
    """A process failed in another way than by a user's mistake."""

    def __init__(self, rank: int, trace: str) -> None:
        super().__init__(f"process {rank} failed: {trace.strip().splitlines()[-1]}\n{trace}")
        self.rank, self.trace = rank, trace


def on_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300, preload: Sequence[str] = ()
) -> list[Any]:
    """`function(*args)` in each of `num_ranks` new processes of one gloo group; what each returns, by rank.

    The function and its arguments are pickled. All processes are forks of one that has imported the function's module
    and those of `preload`; it finds what is installed, nothing that only this process's `sys.path` knows.

    Raises:
        UserError: a rank raised one; its message.
        ProcessError: a rank failed in another way; the one that failed first.
        RuntimeError: a rank does not answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *preload])
    with tempfile.TemporaryDirectory(prefix="tuner-prove-") as directory:
        pipes, processes = {}, []
        try:
            for rank in range(num_ranks):
                reader, writer = context.Pipe(duplex=False)
                arguments = (writer, Path(directory) / "store", rank, num_ranks, timeout, function, args)
                process = context.Process(target=_run, args=arguments, daemon=True)
                process.start()
                writer.close()  # so that the end of the process is the end of the pipe
                pipes[reader] = rank
                processes.append(process)
            return _collect(pipes, time.monotonic() + timeout + STARTING)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(
    writer: Connection,
    store: Path,
    rank: int,
    num_ranks: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may lead nowhere
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout)
        )
        writer.send(Answer(time.time(), function(*args)))
        dist.barrier()  # a rank that is done early must not pull the others' connections down
        dist.destroy_process_group()
    except UserError as error:
        writer.send(Answer(time.time(), mistake=str(error)))
    except Exception:
        writer.send(Answer(time.time(), trace=traceback.format_exc()))


def _collect(pipes: dict[Connection, int], deadline: float) -> list[Any]:
    answers: dict[int, Answer] = {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"no answer from the processes {sorted(waiting.values())} in time")
        new = {waiting[pipe]: _receive(pipe) for pipe in ready if isinstance(pipe, Connection)}
        waiting = {pipe: rank for pipe, rank in waiting.items() if rank not in new}
        _raise_first(new)
        answers |= new
    return [answers[rank].result for rank in sorted(answers)]


def _raise_first(answers: dict[int, Answer]) -> None:
    failed = [(answer.seconds, rank) for rank, answer in answers.items() if answer.mistake or answer.trace]
    if not failed:
        return
    rank = min(failed)[1]
    if (mistake := answers[rank].mistake) is not None:
        raise UserError(mistake)
    raise ProcessError(rank, str(answers[rank].trace))


def _receive(pipe: Connection) -> Answer:
    try:
        return pipe.recv()
    except EOFError:
        return Answer(time.time(), trace="it ended without a word (killed, or out of memory)")
