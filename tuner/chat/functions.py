"""Functions of a Python file that the user names, called in another process; one that hangs does not end the chat."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuner.chat.limited import Written, end_group, read_bounded
from tuner.chat.shown import printable
from tuner.errors import UserError

START_SECONDS = 120.0  # to import the file, which may import much
CALL_SECONDS = 60.0
MEMORY = 8 << 30  # bytes of data
MAX_RESULT = 16_000  # characters of a result that the model gets
MAX_ANSWER = 1 << 20  # bytes that are read at all
PROGRAM = """import json, sys
sys.path[:], *given = json.loads(sys.argv[1])
from tuner.chat.function_process import serve
serve(*given)"""


class FunctionFile:
    """The functions of a file by name, and their schemas; its process is started anew where it had to be ended."""

    def __init__(self, file: Path, *, described: list[str] | None = None, seconds: float = CALL_SECONDS) -> None:
        """`described` names the functions that --tools describes; None makes the schemas from the signatures.

        Raises:
            UserError: there is no such file, it fails, or it has no function that a model could call.
        """
        if not file.is_file():
            raise UserError(f"There is no file {file}. Give a Python file whose functions are the tools.")
        self.file, self.described, self.seconds = file.resolve(), described, seconds
        self._process: subprocess.Popen[bytes] | None = None
        first = self._start()
        self.names: list[str] = first["names"]
        self.tools: list[dict[str, Any]] = first["tools"]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result as text, cut where it is long; what was stopped says so."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"name": name, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
            written = read_bounded(self._process, seconds=self.seconds, max_bytes=MAX_ANSWER, line=True)
        except BrokenPipeError:
            written = Written(b"", "done")
        if written.ending != "done" or not written.data.endswith(b"\n"):
            return self._stopped(written)
        result = printable(json.loads(written.data)["result"])
        return result if len(result) <= MAX_RESULT else f"{result[:MAX_RESULT]}\n[cut: {len(result):,} characters]"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            end_group(self._process)
            self._process = None

    def _stopped(self, written: Written) -> str:
        self.close()
        return {
            "time": f"error: stopped after {self.seconds:g} seconds",
            "size": f"error: stopped, the result has over {MAX_ANSWER:,} bytes",
            "interrupt": "error: stopped by the user",
            "done": "error: its process ended without an answer",
        }[written.ending]

    def _start(self) -> dict[str, Any]:
        given = json.dumps([sys.path, str(self.file), MEMORY, self.described])
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # its own group: Ctrl-C is ours, and all of it can be ended
        )
        written = read_bounded(self._process, seconds=START_SECONDS, max_bytes=MAX_ANSWER, line=True)
        first = json.loads(written.data) if written.data.endswith(b"\n") else {"error": self._stopped(written)}
        if "error" in first:
            self.close()
            raise UserError(f"{self.file} gives no tools: {printable(first['error'])}")
        return first
