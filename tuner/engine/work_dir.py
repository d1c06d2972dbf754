"""The directory of a run: locked while it trains, and never written over what was there."""

import fcntl
import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tuner.engine.checkpoint import (
    checkpoints_directory,
    find_checkpoint,
    is_step,
    list_steps,
    remove_leftovers,
    set_aside,
    step_of,
    verify_checkpoint,
    work_dir_of,
    write_text_atomically,
)
from tuner.engine.together import from_first, gather_objects
from tuner.engine.world import World
from tuner.errors import UserError

LOCK = ".lock"
CONFIG = "config.py"
WRITTEN = ".config.sha256"
"""beside the config.py of a run, whose hash it holds: what a run has written and nobody edited may be replaced"""


@contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Hold the work dir for one run; the system lets go of the lock however the process ends.

    Raises:
        UserError: another run holds it (named by process and host), or it cannot be made.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = (work_dir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{work_dir} cannot be used as work dir: {error}. Choose another with --work-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{work_dir} is in use by another run ({owner(work_dir)}). Choose another --work-dir, or "
                            "end that run first.") from error  # fmt: skip
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def check_shared(work_dir: Path, world: World) -> None:
    """UserError unless all ranks see one and the same work dir: they write a checkpoint together."""
    token = work_dir / f".seen_{uuid.uuid4().hex}"
    token = from_first(token, world)
    if world.is_first:
        token.touch()
    from_first(None, world)  # the token is there by now
    seen = gather_objects(token.exists(), world)
    if world.is_first:
        token.unlink()
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise UserError(
            f"The work dir {work_dir} is another one for the ranks {blind} (another node's disk?). Checkpoints are "
            "written by all ranks together: give a --work-dir on a file system that all nodes share."
        )


def owner(work_dir: Path) -> str:
    """Who holds the lock, as far as its file says."""
    try:
        holder = json.loads((work_dir / LOCK).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):
        return "it is just starting"


def choose_checkpoints(work_dir: Path, resume: str | None) -> list[Path]:
    """The checkpoints to go on from, in the order to try them; [] begins anew. Clears a killed run's drafts.

    Call it under the lock. Nothing is read yet but names: `first_whole` does, with all ranks.

    Args:
        work_dir: where the run will write.
        resume: None, "auto" (the newest whole checkpoint of the work dir), or the path of a checkpoint, which has no
            substitute, or of a work dir.

    Raises:
        UserError: checkpoints are there and would be written over, or none is where one is asked for.
    """
    check_writable(checkpoints_directory(work_dir))
    remove_leftovers(work_dir)
    present = list_steps(work_dir)
    if resume is None:
        if present:
            raise UserError(
                f"{work_dir} holds a run already, up to step {step_of(present[-1])}. Go on with --resume auto, "
                "or choose another --work-dir."
            )
        return []
    if resume == "auto":
        if not present:
            raise UserError(f"--resume: {work_dir} holds no checkpoint. Leave --resume out to begin, or name one.")
        return present[::-1]
    chosen = find_checkpoint(Path(resume))
    candidates = [chosen]
    if not is_step(Path(resume).resolve()):
        candidates = [path.resolve() for path in reversed(list_steps(work_dir_of(Path(resume))))]
    newer = [path.name for path in present if step_of(path) > step_of(candidates[0])]
    if newer:
        raise UserError(
            f"{work_dir} holds newer checkpoints than {chosen} ({', '.join(newer)}), which this run would write over. "
            "Choose another --work-dir, or delete them first."
        )
    return candidates


def check_writable(directory: Path) -> None:
    """UserError where nothing can be written: better now than after the first hours of training."""
    probe = directory / f".probe_{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{directory} cannot take checkpoints: {error}. Choose another --work-dir.") from error


def first_whole(candidates: Sequence[Path], work_dir: Path, world: World) -> Path:
    """The first checkpoint that nothing is wrong with, read by all ranks together, each of them some files.

    Those before it are named with what is wrong; in the work dir they are put aside, so that their steps can be saved.

    Raises:
        UserError: none is whole.
    """
    problems: list[str] = []
    for place, candidate in enumerate(candidates):
        problem = damage(candidate, world)
        if problem is None:
            put_aside(candidates[:place], candidate, work_dir, world)
            return candidate
        problems.append(problem)
        if place + 1 < len(candidates) and world.is_first:
            print(f"warning: {problem} Looking at {candidates[place + 1].name} instead.", file=sys.stderr, flush=True)
    if len(problems) == 1:
        raise UserError(problems[0])
    raise UserError("No checkpoint is whole, so there is nothing to go on from:\n  - " + "\n  - ".join(problems))


def damage(checkpoint: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; None where all is as it was written."""
    problem = None
    try:
        verify_checkpoint(checkpoint, world)
    except UserError as error:
        problem = str(error)
    return next((text for text in gather_objects(problem, world) if text is not None), None)


def put_aside(unusable: Sequence[Path], chosen: Path, work_dir: Path, world: World) -> None:
    """Give damaged checkpoints of this work dir other names; `latest` is then the one that is used."""
    home = checkpoints_directory(work_dir).resolve()
    own = [path for path in unusable if path.resolve().parent == home]
    if world.is_first and own:
        for path in own:
            print(f"warning: {path.name} is kept as {set_aside(path).name}", file=sys.stderr, flush=True)
        write_text_atomically(home / "latest", chosen.name + "\n")
    from_first(None, world)


def write_config(work_dir: Path, source: str, is_resumed: bool) -> None:
    """Write the config of the run as its author wrote it, with the settings filled in.

    Raises:
        UserError: a config.py is there which no run has written, such as a recipe of the user's own.
    """
    path = work_dir / CONFIG
    is_used = is_resumed or (work_dir / "metrics.jsonl").exists()
    if path.exists() and not is_used and path.read_text(encoding="utf-8") != source and not is_a_runs(path):
        raise UserError(f"{path} exists and is another config; it was left as it is. Choose another --work-dir.")
    write_text_atomically(path, source)
    write_text_atomically(path.with_name(WRITTEN), digest(path))


def is_a_runs(path: Path) -> bool:
    """Whether a config.py is as a run has written it, one that failed before its first step."""
    note = path.with_name(WRITTEN)
    return note.exists() and note.read_text(encoding="utf-8") == digest(path)


def digest(path: Path) -> str:
    """sha256 of a file, with a line end."""
    return hashlib.sha256(path.read_bytes()).hexdigest() + "\n"
