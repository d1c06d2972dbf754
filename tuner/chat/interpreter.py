"""Code that a model wrote, in a process with limits, an empty directory and an environment without secrets.

This keeps mistakes small. It is no sandbox: the code runs as the user, and can read and send what the user can.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tuner.chat.limited import END_SECONDS, Written, end_group, read_bounded
from tuner.chat.shown import printable
from tuner.errors import UserError

SECONDS = 30.0  # on the clock
MAX_OUTPUT = 16_000  # bytes that are read
LIMITS = {
    "RLIMIT_CPU": 20,  # seconds
    "RLIMIT_AS": 2 << 30,  # bytes
    "RLIMIT_FSIZE": 16 << 20,  # bytes, of each file
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 0,  # no further process or thread; the system's administrator is exempt
}
PROGRAM = Path(__file__).with_name("interpreter_process.py")
PR_SET_DUMPABLE = 4  # linux/prctl.h


def run_code(code: str, *, seconds: float = SECONDS, limits: dict[str, int] = LIMITS) -> str:
    """What the code printed, and a line in brackets where it did not end by itself; each call begins anew."""
    with tempfile.TemporaryDirectory(prefix="tuner-code-", ignore_cleanup_errors=True) as directory:
        with tempfile.TemporaryFile() as source:
            source.write(code.encode(errors="replace"))
            source.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", str(PROGRAM), json.dumps(limits)],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment(directory),
                start_new_session=True,  # its own group: Ctrl-C is ours, and all of it can be ended
            )
        try:
            written = read_bounded(process, seconds=seconds, max_bytes=MAX_OUTPUT)
            code_of_exit = process.wait(END_SECONDS) if written.ending == "done" else None
        finally:
            end_group(process)
    return "\n".join(filter(None, [printable(written.data.decode(errors="replace")).rstrip("\n"),
                                   how_ended(written, code_of_exit, seconds)]))  # fmt: skip


def how_ended(written: Written, code: int | None, seconds: float) -> str:
    """A line for what did not end by itself, empty for what did."""
    if written.ending == "time":
        return f"[stopped after {seconds:g} seconds]"
    if written.ending == "size":
        return f"[stopped after {MAX_OUTPUT:,} bytes of output]"
    if written.ending == "interrupt":
        return "[stopped by the user]"
    return f"[ended by {signal.Signals(-code).name}]" if code is not None and code < 0 else ""


def environment(directory: str) -> dict[str, str]:
    """What Python needs; nothing of the user's own, so no token either."""
    return {
        "PATH": os.defpath,
        "HOME": directory,
        "TMPDIR": directory,
        "LANG": "C.UTF-8",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def hide_environment() -> None:
    """Close this process to others of the same user, who could read its environment in /proc; for as long as it lives.

    Raises:
        UserError: the system does not do it.
    """
    if not sys.platform.startswith("linux"):
        return  # no /proc/PID/environ there
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise UserError(f"--allow-code: {os.strerror(ctypes.get_errno())} when closing this process to others.")
