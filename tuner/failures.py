"""What stopped a process, told once: by the rank that failed first, where several run and the others fail of that."""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tuner.errors import LostRankError, UserError
from tuner.masking import mask

EXIT_UNEXPECTED, EXIT_USER_ERROR, EXIT_LOST_RANK, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_SAVED = 75
"""of a run that was told to end and has saved: start it again with --resume"""
LAUNCH_DIR = "TUNER_LAUNCH_DIR"
"""set for the ranks that `tuner train --nproc N` starts: where each writes what stopped it, for the launcher to tell"""
PLACE_SIZE = 1024  # bytes
ECHO_SECONDS = 3.0  # that a rank which lost its connections waits for the one whose fault it was
ECHO_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "PeerError")
ECHO_WORDS = ("connection closed by peer", "connection reset", "broken pipe", "gloo/transport", "remote process exited")


class Failure(NamedTuple):
    """What stopped a rank. An echo says no more than that another rank is gone."""

    rank: int
    host: str
    seconds: float  # since the epoch
    code: int  # that the process exits with
    message: str
    is_echo: bool = False
    trace: str = ""

    @property
    def order(self) -> tuple[bool, float, int]:
        """The least of several failures is the cause of the others."""
        return self.is_echo, self.seconds, self.rank


def exit_code(error: Exception) -> int:
    """2 where the user can mend it, 3 where a rank did not come, 1 for anything else."""
    if isinstance(error, LostRankError):
        return EXIT_LOST_RANK
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_UNEXPECTED


def message_of(error: Exception) -> str:
    """What is printed for an exception in place of its traceback, without tokens and passwords."""
    if isinstance(error, (UserError, LostRankError)):
        return mask(f"Error: {error}")
    first_line = str(error).strip().partition("\n")[0]
    return mask(f"{type(error).__name__}: {first_line} (run with --debug for the traceback)")


def trace_of(error: Exception) -> str:
    """The traceback of an exception, without tokens and passwords."""
    return mask("".join(traceback.format_exception(error)))


def is_echo(error: Exception) -> bool:
    """Whether an exception looks like what ranks raise once another has left them."""
    if isinstance(error, (UserError, LostRankError)):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return not kinds.isdisjoint(ECHO_TYPES) or any(words in text for words in ECHO_WORDS)


def note(error: Exception, environment: Mapping[str, str] = os.environ) -> bool:
    """Write down, once, what stops this process; whether this process is the one that shall tell it.

    A rank that our launcher started leaves the telling to it. One that another launcher started tells it unless
    another rank of its node was first. Call it before closing the connections whose end is an echo on other ranks.
    """
    if (directory := environment.get(LAUNCH_DIR)) is not None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C; this rank is ending already
        write_failure(Path(directory), _failure(error, int(environment["RANK"])))
        return False
    claims = _claims(environment)
    return claims is None or _claim(claims, environment["RANK"], wait=ECHO_SECONDS if is_echo(error) else 0.0)


def tell(error: Exception, *, debug: bool) -> None:
    """Print what stopped this process, unless another does."""
    if not note(error):
        return
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    whose = "" if rank is None or isinstance(error, UserError) else f"rank {rank}: "
    text = trace_of(error) if debug else f"{whose}{message_of(error)}\n"
    sys.stderr.write(text)
    sys.stderr.flush()


def failure_path(directory: Path, rank: int) -> Path:
    """Where a rank writes what stopped it."""
    return directory / f"failure_{rank}.json"


def write_failure(directory: Path, failure: Failure) -> None:
    """Write it unless this rank has written one; it is seen whole or not at all."""
    path = failure_path(directory, failure.rank)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(failure._asdict()), encoding="utf-8")
    if not path.exists():
        draft.rename(path)


def place_path(directory: Path, rank: int) -> Path:
    """Where a rank keeps what `last_words` made of its place, for when it is killed."""
    return directory / f"place_{rank}"


def last_words(step: int, phase: str, documents: Sequence[str]) -> bytes:
    """Where a process is, always as many bytes: they are written over those of before, and never cut in two.

    Args:
        step: counted from 1; 0 before the first.
        documents: a few of the step's; empty where they are not known.
    """
    text = where(step, phase) + (f" with the documents {', '.join(documents)}" if documents else "")
    return text.encode()[:PLACE_SIZE].ljust(PLACE_SIZE)


def where(step: int, phase: str) -> str:
    """A place for a person."""
    return f"in step {step} ({phase})" if step else f"before its first step ({phase})"


def read_last_words(directory: Path, rank: int) -> str:
    """A sentence on where a killed rank was; empty where it had no place yet."""
    path = place_path(directory, rank)
    text = path.read_bytes().decode(errors="replace").rstrip() if path.exists() else ""
    return f" It was {text}." if text else ""


def read_failure(text: str) -> Failure:
    """The opposite of writing one."""
    return Failure(**json.loads(text))


def _failure(error: Exception, rank: int) -> Failure:
    message, trace = message_of(error), trace_of(error)
    return Failure(rank, socket.gethostname(), time.time(), exit_code(error), message, is_echo(error), trace)


def _claims(environment: Mapping[str, str]) -> Path | None:
    """A directory that the ranks of a node share, and no other run; None for a process that runs alone."""
    if not {"RANK", "WORLD_SIZE"} <= set(environment) or environment["WORLD_SIZE"] == "1":
        return None
    if (file := environment.get("TORCHELASTIC_ERROR_FILE")) is not None:  # DIR/attempt_0/LOCAL_RANK/error.json
        return Path(file).parent.parent
    if "SLURM_STEP_ID" in environment:
        step = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
        return Path(tempfile.gettempdir()) / f"tuner-{os.getuid()}-{step}"
    return None


def _claim(directory: Path, rank: str, *, wait: float) -> bool:
    """Whether this rank is the one of its node that tells; with `wait`, others may come first for so many seconds."""
    claim = directory / "told_by_rank"
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and not claim.exists():
        time.sleep(0.1)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        with claim.open("x", encoding="utf-8") as file:
            file.write(rank)
    except FileExistsError:
        return claim.read_text(encoding="utf-8") == rank
    except OSError:
        return True  # twice is better than never
    return True
