"""Run a function on several gloo processes of this machine, as a test does."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STARTING = 120  # seconds that importing torch may take on a busy machine
CONTEXT = multiprocessing.get_context("forkserver")  # imports once for all tests of a run; each rank is a fork of that
CONTEXT.set_forkserver_preload(["torch.distributed", "tuner.method.sft"])


class RankError(AssertionError):
    """What the first rank to fail said."""


def run_on_ranks(num_ranks: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` in each of `num_ranks` new processes of one gloo group; what each returns, by rank.

    The function and its arguments are pickled: it stands at the top level of a module. `dist.get_rank()` tells it
    where it is. The first start in a process costs the imports.

    Raises:
        RankError: with the traceback of the rank that failed first; what others say because of it is left out.
    """
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        pipes, processes = {}, []
        try:
            for rank in range(num_ranks):
                reader, writer = CONTEXT.Pipe(duplex=False)
                target_args = (writer, dict(os.environ), store, rank, num_ranks, timeout, function, args)
                process = CONTEXT.Process(target=_run_rank, args=target_args, daemon=True)
                process.start()
                writer.close()  # so that the end of the process is the end of the pipe
                pipes[reader] = rank
                processes.append(process)
            return _collect(pipes, time.monotonic() + timeout + STARTING)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(
    writer: Connection,
    environment: dict[str, str],
    store: Path,
    rank: int,
    num_ranks: int,
    timeout: float,
    function: Callable,
    args: tuple,
) -> None:
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may lead nowhere
    torch.set_num_threads(1)
    try:
        init = {"init_method": f"file://{store}", "rank": rank, "world_size": num_ranks}
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **init)
        writer.send((time.time(), None, function(*args)))
        dist.barrier()  # a rank that is done early must not pull the others' connections down
        dist.destroy_process_group()
    except BaseException:
        writer.send((time.time(), traceback.format_exc(), None))
        raise SystemExit(1) from None


def _collect(pipes: dict[Connection, int], deadline: float) -> list[Any]:
    """One message from each rank, or the earliest failure."""
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"no answer in time from the ranks {sorted(waiting.values())}")
        messages = {waiting.pop(pipe): _receive(pipe) for pipe in ready}
        failed = {rank: message for rank, message in messages.items() if message[1] is not None}
        if failed:
            first = min(failed, key=lambda rank: failed[rank][0])
            raise RankError(f"rank {first} failed:\n{failed[first][1]}")
        results |= {rank: message[2] for rank, message in messages.items()}
    return [results[rank] for rank in sorted(results)]


def _receive(pipe: Connection) -> tuple[float, str | None, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return time.time(), "it ended without a word (killed, or out of memory)", None
