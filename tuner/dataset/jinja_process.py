"""Jinja templates of others in a process of their own, in transformers' sandbox, with bounded time and memory."""

import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.dataset.group_signals import STOP_SIGNALS
from tuner.dataset.jinja_spans import Layout, Span
from tuner.dataset.messages import Message, RowError
from tuner.errors import UserError

CPU_SECONDS = 10  # for one conversation; a long one takes a few milliseconds
MEMORY = 2 << 30
MAX_ERROR = 2000  # characters of what a template says against a row
DATE = datetime.datetime(
    2024, 7, 26
)  # a template that writes today's date writes this one: shards must not depend on the day
PROGRAM = "import sys; sys.path[:] = {path!r}; from tuner.dataset.jinja_process import serve; serve()"


class TemplateProcess:
    """Another process that lays out conversations; it is started when first asked, and again when it had to end."""

    def __init__(self, jinja: str, variables: Mapping[str, str], marks: Sequence[str], soft: Sequence[str]) -> None:
        """`variables` are the tokenizer's special tokens, which templates read; `marks` all texts that are one id.

        `soft` are those of them that are the template's in the model's own words, too, if it looks for them there.
        """
        self._setup = {"jinja": jinja, "variables": dict(variables), "marks": [*marks], "soft": [*soft]}
        self._limits = {"seconds": CPU_SECONDS, "memory": MEMORY}
        self._process: subprocess.Popen[str] | None = None

    def lay_out(
        self, messages: Sequence[Message], tools: list[Any] | None, turns: Sequence[int], prompt: bool, **choices: bool
    ) -> Layout:
        """See Finder.lay_out. Raises RowError, also for a conversation that takes too long."""
        answer = self._ask({"messages": messages, "tools": tools, "turns": turns, "prompt": prompt, **choices})
        if "error" in answer:
            raise RowError(answer["error"])
        spans = [Span(*span) for span in answer["spans"]]
        return Layout(answer["text"], [(start, end) for start, end in answer["fences"]], spans)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = _start()
            self._send(self._limits)
            self._send(self._setup)
        self._send(request)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended()
        return json.loads(answer)

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> UserError:
        assert self._process is not None
        status = self._process.wait()
        self._process = None
        if status in (-signal.SIGPROF, -signal.SIGKILL):
            return RowError(
                f"the tokenizer's chat template was stopped after {self._limits['seconds']} CPU seconds; it may run for"
                " ever. Use one of tuner's own templates."
            )
        return UserError(f"the process that renders the tokenizer's chat template ended with status {status}.")


def _start() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(path=sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    weakref.finalize(process, _stop, process.stdin)
    return process


def _stop(pipe: Any) -> None:
    """The end of its input ends the process."""
    try:
        pipe.close()
    except BrokenPipeError:
        return  # it has ended already


def serve() -> None:
    """The other process: one line of JSON in, one out; what takes too long or too much is ended by the system."""
    for number in STOP_SIGNALS:  # they are for the one that asks, whose end is that of our input
        signal.signal(number, signal.SIG_IGN)
    from tuner.dataset.jinja_sandbox import open_finder

    limits, setup = json.loads(sys.stdin.readline()), json.loads(sys.stdin.readline())
    limit = _memory() + limits["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    finder, problem = None, ""
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])  # SIGPROF, which is not handled, ends the process
    try:
        finder = open_finder(**setup)
    except RowError as error:
        problem = str(error)[:MAX_ERROR]
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        try:
            answer = {"error": problem} if finder is None else finder.lay_out(**json.loads(line))._asdict()
        except RowError as error:
            answer = {"error": str(error)[:MAX_ERROR]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:
            os._exit(0)  # who asked is gone; at its own exit Python would try to write once more, and say so


@contextmanager
def limited_here() -> Iterator[None]:
    """Bound what is rendered inside in this very process, which SIGPROF ends after CPU_SECONDS.

    For a check that transformers itself, and not our rendering, gives the same; in a process made for it.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory() -> int:
    """Bytes of address space that this process has already, where the system says so."""
    place = Path("/proc/self/statm")
    return int(place.read_text().split()[0]) * resource.getpagesize() if place.exists() else MEMORY
