"""Starts the ranks of a run on this node, passes signals on, ends all when one fails, and starts them again."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tuner.dataset.group_signals import STOP_SIGNALS, is_nohup
from tuner.engine.checkpoint import list_checkpoints
from tuner.failures import ECHO_SECONDS, EXIT_INTERRUPTED, EXIT_USER_ERROR, LAUNCH_DIR, Failure
from tuner.launch.nodes import Nodes, meet
from tuner.launch.options import Node, Options
from tuner.launch.processes import CALM, Processes, log_path, no_address
from tuner.launch.rank import write_run

POLL_SECONDS = 0.1
ASK_SECONDS = 0.5  # between two questions to the other nodes
SAME_SECONDS = 1.0  # a signal sooner after another is no second one: a terminal that closes sends two kinds at once
EXIT_TERMINATED = 128 + signal.SIGTERM


class Run(NamedTuple):
    """What all ranks do: the rendered config, so that later edits of its file change nothing, and where it writes."""

    source: str
    work_dir: Path
    resume: str | None
    command: Sequence[str]
    debug: bool = False
    check_size: Callable[[int], None] = lambda num_ranks: None  # UserError where so many ranks cannot do it

    @property
    def log_dir(self) -> Path:
        """Where ranks that are not the first write what they would print."""
        return self.work_dir / "logs"


class Outcome(NamedTuple):
    """How an attempt ended: the exit code, what stopped it if anything did, and whether that is for us to tell."""

    code: int
    failure: Failure | None = None
    is_ours: bool = False

    @property
    def is_worth_another(self) -> bool:
        """Whether starting again may help: not where the user must mend something, or wanted the end."""
        return self.failure is not None and self.code not in (EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED)


class Signals:
    """The signals that came to this process: the last one, when it came, and how many."""

    def __init__(self) -> None:
        self.last: signal.Signals | None = None
        self.seconds = 0.0
        self.count = 0

    def take(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; as a handler it does no more than that."""
        now = time.monotonic()
        if self.last is None or now - self.seconds > SAME_SECONDS:
            self.last, self.seconds = signal.Signals(number), now
            self.count += 1

    def are_over(self, grace: float) -> bool:
        """Whether ranks have had their time to save since the signal; a second one ends it at once."""
        return self.count > 1 or (self.last is not None and time.monotonic() - self.seconds > grace)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals that ask for an end, in place of what they do elsewhere."""
        numbers = [number for number in STOP_SIGNALS if not is_nohup(number)]
        before = {number: signal.signal(number, self.take) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def launch(run: Run, node: Node, options: Options) -> int:
    """Run the processes of this node to their end, together with those of the others; the exit code of the command.

    Raises:
        UserError: the nodes do not meet, their ranks are a wrong number, or a port is in use; what stops a rank is
            told, and comes as an exit code.
    """
    run.log_dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="tuner-launch-"))
    signals = Signals()
    try:
        nodes = meet(node, timeout=options.node_timeout, say=say)
        run.check_size(sum(nodes.counts))
        with signals.taken():
            return run_attempts(run, nodes, signals, options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_attempts(run: Run, nodes: Nodes, signals: Signals, options: Options, directory: Path) -> int:
    """Start the ranks until they come to their end, fail for good, or are told to end; the exit code."""
    for attempt in range(options.max_restarts + 1):
        own = directory / f"attempt_{attempt}"
        own.mkdir()
        outcome = run_attempt(run, nodes, signals, options, attempt, own)
        if not nodes.all_ended(attempt) or not outcome.is_worth_another or signals.count:
            break
        if attempt < options.max_restarts:
            say(f"tuner: all ranks are started again ({attempt + 1} of {options.max_restarts} restarts)")
    return outcome.code


def run_attempt(
    run: Run, nodes: Nodes, signals: Signals, options: Options, attempt: int, directory: Path
) -> Outcome:  # fmt: skip
    """Start the ranks of this node once and stay until none of them is left."""
    resume = "auto" if attempt and list_checkpoints(run.work_dir) else run.resume
    write_run(directory, run.source, resume)
    processes = Processes(nodes.place(attempt), nodes.node.num_processes, directory, run.log_dir)
    try:
        processes.start(run.command, common_variables(nodes.node, options, attempt, directory))
        outcome = watch(processes, nodes, signals, options, attempt)
        if outcome.failure is not None:
            if outcome.is_ours or nodes.node.is_first:
                say(description(outcome.failure, run, nodes.node))  # before anything that ranks say as they end
            processes.end()
        return outcome
    finally:
        processes.end()


def common_variables(node: Node, options: Options, attempt: int, directory: Path) -> dict[str, str]:
    """What the environments of all ranks of an attempt have in common; the names are torchrun's where it has one."""
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **os.environ,
        **no_address(node.host, os.environ),
        "GROUP_RANK": str(node.rank),
        "GROUP_WORLD_SIZE": str(node.num_nodes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(options.max_restarts),
        LAUNCH_DIR: str(directory),
    }


def watch(processes: Processes, nodes: Nodes, signals: Signals, options: Options, attempt: int) -> Outcome:
    """Pass signals on until all ranks have ended, one has failed here or elsewhere, or patience ends."""
    asked, is_passed_on = 0.0, False
    while True:
        time.sleep(POLL_SECONDS)
        if signals.last is not None and not is_passed_on:
            is_passed_on = True
            say(f"tuner: {signals.last.name}: ranks end their step, save and leave; the signal again ends them at once")
            processes.send(signal.SIGINT if signals.last == signal.SIGINT else signal.SIGTERM)
        if processes.all_ended() and (signals.last is not None or set(processes.codes().values()) <= set(CALM)):
            return ended(processes, nodes, signals, attempt)
        if signals.are_over(options.grace):
            processes.end()
            return ended(processes, nodes, signals, attempt)
        failure = cause(processes.failures(), time.time())
        is_ours = failure is not None
        if failure is not None:
            failure = nodes.report(attempt, failure)
        elif time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            failure = nodes.failure(attempt)
        if failure is not None:
            return Outcome(failure.code, failure, is_ours)


def ended(processes: Processes, nodes: Nodes, signals: Signals, attempt: int) -> Outcome:
    """The outcome where all ranks have ended calmly, or after a signal that asked for it."""
    codes = set(processes.codes().values())
    if codes <= set(CALM) or signals.last is None:
        return Outcome(max(codes))
    code, host = 128 + signals.last, socket.gethostname()
    words = f"node {nodes.node.rank} ({host}) was told to end by {signals.last.name}."
    nodes.report(attempt, Failure(processes.place.first_rank, host, time.time(), code, words))
    return Outcome(code)


def cause(failures: list[Failure], now: float) -> Failure | None:
    """What stopped the run; None where nothing did, or where all that came is an echo and the cause may yet come."""
    if not failures:
        return None
    first = min(failures, key=lambda failure: failure.order)
    return None if first.is_echo and now - first.seconds < ECHO_SECONDS else first


def description(failure: Failure, run: Run, node: Node) -> str:
    """What the user reads of what stopped the run."""
    text = failure.trace.rstrip("\n") if run.debug and failure.trace else failure.message
    if failure.code == EXIT_USER_ERROR and node.num_nodes == 1:
        return text
    whose = f"rank {failure.rank}" + (f" on {failure.host}" if node.num_nodes > 1 else "")
    hint = "" if failure.rank == 0 else f"\nWhat else it said is in {log_path(run.log_dir, failure.rank)}"
    return f"{whose}: {text}{hint}"


def say(text: str) -> None:
    """A line of the launcher itself."""
    print(text, file=sys.stderr, flush=True)
