"""Training as ranks that can be killed, in forks of a process that has imported everything: a trial takes seconds."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from preview_runs import PRESET, write_run
from ranks import PRELOAD_ZERO

from tuner.config import render
from tuner.engine.checkpoint import checkpoints_directory, list_checkpoints, step_of
from tuner.prove.resume import read_metrics

MODEL = {
    **{"model_type": "internlm2", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1010, "max_position_embeddings": 256},
}
PATIENCE = 240.0  # seconds for the ranks of a run to end
POLL_SECONDS = 0.001


def write_source(folder: Path, **settings: Any) -> str:
    """The text of a config of a small run that saves every step, and beside it its data and its tokenizer."""
    data = write_run(folder)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    given = {
        **data,
        **{"weights": "random", "max_steps": 30, "num_epochs": 100, "num_accumulation_steps": 2, "precision": "fp32"},
        **{"save_interval": 1, "keep_checkpoints": 1, "sample_interval": 0, "log_interval": 1, "lr": 1e-2},
    }
    return render(PRESET, {name: str(value) for name, value in (given | settings).items()})


class Fault(NamedTuple):
    """What happens to a rank by itself."""

    point: str = ""  # "module:function" in front of which, or behind which, it kills itself
    behind: bool = False
    call: int = 1  # the how manieth call of it
    hangs: bool = False  # in place of killing itself
    max_file_size: int | None = None  # bytes, beyond which the system refuses to write


def rank_main(environment: dict[str, str], log: Path, source: str, work_dir: Path, fault: Fault) -> None:
    """A rank, as torchrun would have started it."""
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tuner.failures import exit_code, tell
    from tuner.train import train

    if fault.point:
        kill_at(fault)
    if fault.max_file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.max_file_size, fault.max_file_size))
    try:
        train(source, work_dir=work_dir, resume="auto" if list_checkpoints(work_dir) else None)
    except Exception as error:
        tell(error, debug=fault.max_file_size is None)
        os._exit(exit_code(error))


def kill_at(fault: Fault) -> None:
    """Make a function end the process with SIGKILL, or never return."""
    import importlib

    module_name, name = fault.point.split(":")
    module = importlib.import_module(module_name)
    function: Callable[..., Any] = getattr(module, name)
    num_calls = 0

    def deadly(*args: Any, **settings: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == fault.call and not fault.behind:
            end_or_hang(fault)
        result = function(*args, **settings)
        if num_calls == fault.call:
            end_or_hang(fault)
        return result

    setattr(module, name, deadly)


def end_or_hang(fault: Fault) -> None:
    """What happens to a rank at its point."""
    if not fault.hangs:
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"hangs at {time.time()}", flush=True)
    time.sleep(PATIENCE)


class Trials:
    """A run in a work dir, whose ranks are started as often as they were killed."""

    def __init__(self, folder: Path, source: str, *, num_ranks: int = 1) -> None:
        self.source, self.num_ranks = source, num_ranks
        self.work_dir, self.log = folder / "run", folder / "run.log"
        self.num_inside = 0  # kills while something was being written
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trials", *PRELOAD_ZERO])
        self._processes: list[BaseProcess] = []

    def start(self, fault: Fault = Fault()) -> None:  # noqa: B008 - a tuple
        """Start the ranks; `fault` is that of the first."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.num_ranks):
            size = str(self.num_ranks)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = {**os.environ, **common, **own} if self.num_ranks > 1 else dict(os.environ)
            args = (environment, self.log, self.source, self.work_dir, fault if rank == 0 else Fault())
            process = self._context.Process(target=rank_main, args=args)
            process.start()
            self._processes.append(process)

    def wait(self) -> list[int | None]:
        """The exit codes, once all have ended; None of those that had to be killed for it."""
        deadline = time.monotonic() + PATIENCE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        self.kill()
        return codes

    def finish(self) -> None:
        """Train to the end."""
        self.start()
        codes = self.wait()
        assert codes == [0] * self.num_ranks, (codes, self.log.read_text()[-3000:])

    def kill(self) -> bool:
        """SIGKILL to all ranks; whether one was still there."""
        alive = [process.exitcode is None for process in self._processes]
        for process in self._processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()
        self._processes = []
        return any(alive)

    def kill_after(self, seconds: float, *, inside: bool, step: int) -> bool:
        """Kill all ranks `seconds` after they are past `step`, or in the next write; False where they had ended."""
        while self.reached() < step:
            if not self._are_there():
                return self.kill()
            time.sleep(POLL_SECONDS)
        time.sleep(seconds)
        while inside and not self.is_writing() and self._are_there():
            time.sleep(POLL_SECONDS)
        killed = self.kill()
        self.num_inside += killed and self.is_writing()
        return killed

    def _are_there(self) -> bool:
        return all(process.exitcode is None for process in self._processes)

    def is_writing(self) -> bool:
        """Whether a draft lies there."""
        return any(checkpoints_directory(self.work_dir).glob(".draft_*"))

    def reached(self) -> int:
        """The last step of which there is a line."""
        return max(read_metrics(self.work_dir), default=0)

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 without any."""
        return max(map(step_of, list_checkpoints(self.work_dir)), default=0)


if __name__ == "__main__":
    sys.exit("this is for tests to import")
