"""Processes that render chat templates as forks of one that has imported transformers: a start costs no second."""

import multiprocessing
import os
import sys
import weakref
from multiprocessing.connection import Connection
from typing import TextIO

from ranks import start_server

from tuner.dataset.jinja_process import _stop, serve


class Fork:
    """What TemplateProcess asks of a `subprocess.Popen`: `stdin` and `stdout` as text, and `wait()`."""

    def __init__(self) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        questions, self._asks = context.Pipe(duplex=False)
        self._hears, answers = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(questions, answers), daemon=True)
        self._process.start()
        questions.close()
        answers.close()
        self.stdin = _text(self._asks, "w")
        self.stdout = _text(self._hears, "r")
        weakref.finalize(self, _stop, self.stdin)

    def wait(self) -> int | None:
        """The status as `subprocess` counts it: -N after signal N."""
        self._process.join()
        return self._process.exitcode


def _text(end: Connection, mode: str) -> TextIO:
    return os.fdopen(os.dup(end.fileno()), mode)


def _serve(questions: Connection, answers: Connection) -> None:
    sys.stdin, sys.stdout = _text(questions, "r"), _text(answers, "w")
    questions.close()
    answers.close()
    serve()
