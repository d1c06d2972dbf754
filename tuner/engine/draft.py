"""What ranks put into the draft of a checkpoint: files hashed while they are written, then a note that all are whole.

Ranks tell each other by files, not by collectives: the notes are written beside training, which has those for itself.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tuner.engine.checkpoint import Entry, write_text_atomically
from tuner.engine.world import World

POLL_SECONDS = 0.05


class GivenUpError(RuntimeError):
    """Nobody waits for the other ranks any longer."""


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Entry:
    """Write a new file to the disk, hashing what passes; nothing is read again.

    Raises:
        OSError: the disk refused.
    """
    digest, size = hashlib.sha256(), 0
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def note_written(draft: Path, world: World, entries: Mapping[str, Entry]) -> None:
    """Say that all files of this rank are whole."""
    write_text_atomically(draft / note_name(world.rank), json.dumps({"files": entries}))


def note_failed(draft: Path, world: World, problem: str) -> None:
    """Say that there will be none, as far as the disk lets; training's own exchange says it again."""
    try:
        write_text_atomically(draft / note_name(world.rank), json.dumps({"problem": problem}))
    except OSError:
        return


def note_name(rank: int) -> str:
    """The file in which a rank says how its own came out; gone before the checkpoint is published."""
    return f".written-{rank:05d}.json"


def gather_notes(
    draft: Path, world: World, given_up: threading.Event, *, waits_for: Callable[[int], None]
) -> dict[str, Entry]:
    """Wait until all ranks have written, telling `waits_for` of each whom it is for; the entries of all files.

    Raises:
        OSError: a rank could not.
        GivenUpError: `given_up` was set meanwhile.
    """
    entries: dict[str, Entry] = {}
    for rank in range(world.size):
        path = draft / note_name(rank)
        waits_for(rank)
        while not path.exists():
            if given_up.wait(POLL_SECONDS):
                raise GivenUpError(f"rank {rank} had not written its files")
        note = json.loads(path.read_text(encoding="utf-8"))
        if "problem" in note:
            raise OSError(f"rank {rank}: {note['problem']}")
        entries |= note["files"]
    for rank in range(world.size):
        (draft / note_name(rank)).unlink()
    return entries
