"""Checkpoint directories: written aside, sealed with a manifest, published by a rename, verified before use."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.dataset.cache import hash_file, sync
from tuner.engine.together import all_or_none
from tuner.engine.world import ALONE, World
from tuner.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
STEP_NAME = re.compile(r"step_(\d{8,})$")


def checkpoints_directory(work_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return work_dir / "checkpoints"


def checkpoint_path(work_dir: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` optimizer steps."""
    return checkpoints_directory(work_dir) / f"step_{step:08d}"


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Published checkpoints of a run, oldest step first; drafts and other directories are not listed.

    The order is that of the steps: neither clocks nor the `latest` file, which a kill can leave one behind, decide.
    """
    found = [path for path in checkpoints_directory(work_dir).glob("step_*") if STEP_NAME.match(path.name)]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint, from its directory's name."""
    match = STEP_NAME.match(checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest one of a work dir.

    Raises:
        UserError: the path does not exist, or holds no whole checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path.resolve()
    if not path.is_dir():
        raise UserError(f"{path} is not a directory. Give a work dir or one of its checkpoints/step_... directories.")
    if STEP_NAME.match(path.name):
        raise UserError(f"{path} has no {MANIFEST}: it is not a whole checkpoint. Copy it again or choose another.")
    work_dir = path.parent if path.name == "checkpoints" else path
    checkpoints = list_checkpoints(work_dir)
    if not checkpoints:
        raise UserError(f"{path} holds no checkpoint. Give a work dir in which a run has saved one.")
    return checkpoints[-1].resolve()


@contextmanager
def publishing(work_dir: Path, step: int, world: World = ALONE) -> Iterator[Path]:
    """A draft directory for all ranks to write into; at the end of the block it becomes the newest checkpoint.

    Until the rename nothing under `checkpoints/` that others look at changes; a failure removes the draft. What fails
    on one rank must fail on all (`all_or_none`) before the block ends.
    """
    home = checkpoints_directory(work_dir)
    final = checkpoint_path(work_dir, step)
    draft = home / f".draft_{final.name}"
    with all_or_none(world, (OSError,)):
        if world.is_first:
            begin_draft(draft, final)
    try:
        yield draft
        with all_or_none(world, (OSError,)):
            if world.is_first:
                seal(draft)
                draft.rename(final)
                write_text_atomically(home / "latest", final.name + "\n")
    except BaseException:
        if world.is_first:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def begin_draft(draft: Path, final: Path) -> None:
    """An empty directory; an OSError where the checkpoint is there already."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise FileExistsError(f"{final} is there already")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()


def seal(directory: Path) -> None:
    """Write the manifest of every file below `directory` and force all of it to the disk."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
            sync(path)
    manifest = {"format": FORMAT, "files": files, "sha256": hash_entries(files)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(directory / MANIFEST)
    for path in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync(path)


def verify_checkpoint(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: naming the first file that is missing, shorter, longer or has other bytes.
    """
    files = read_manifest(directory)
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if path.stat().st_size != entry["size"]:
            raise damaged(path, f"it has {path.stat().st_size} bytes, the manifest says {entry['size']}")
        if hash_file(path) != entry["sha256"]:
            raise damaged(path, "its bytes have another sha256 than the manifest says")


def read_manifest(directory: Path) -> dict[str, dict]:
    """File name -> {"size", "sha256"} of a checkpoint; a damaged manifest is a UserError."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, checksum, version = manifest["files"], manifest["sha256"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"it cannot be read ({error})") from error
    if checksum != hash_entries(files):
        raise damaged(path, "its own sha256 does not fit")
    if version != FORMAT:
        raise UserError(f"{directory} has checkpoint format {version}; this version of tuner reads {FORMAT}.")
    return files


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file that is not what was saved."""
    return UserError(f"{path} is damaged: {reason}. Use another checkpoint, or a copy of this one.")


def prune(work_dir: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints (None: keep every one); call it after a new one is published."""
    home = checkpoints_directory(work_dir)
    for path in list_checkpoints(work_dir)[:-keep] if keep else []:
        doomed = home / f".deleted_{path.name}"
        path.rename(doomed)  # half-deleted must never look whole
        shutil.rmtree(doomed)


def remove_leftovers(work_dir: Path) -> None:
    """Delete drafts and half-deleted checkpoints of a run that was killed; only the holder of the lock may."""
    home = checkpoints_directory(work_dir)
    for path in [*home.glob(".draft_*"), *home.glob(".deleted_*")]:
        shutil.rmtree(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new content, also after a power cut."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def hash_entries(files: dict[str, dict]) -> str:
    """sha256 of the manifest's entries, so that a flipped digit in the manifest itself is found."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
