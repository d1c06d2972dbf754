"""Checkpoint directories: written aside, sealed with a manifest, published by a rename, verified before use."""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from tuner.dataset.cache import hash_file, sync
from tuner.engine.world import ALONE, World
from tuner.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
STEP_NAME = re.compile(r"step_(\d{8,})$")


class Entry(TypedDict):
    """What the manifest says of a file."""

    size: int  # bytes
    sha256: str


def checkpoints_directory(work_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return work_dir / "checkpoints"


def checkpoint_path(work_dir: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` optimizer steps."""
    return checkpoints_directory(work_dir) / f"step_{step:08d}"


def draft_of(checkpoint: Path) -> Path:
    """The directory in which a checkpoint is written until it is whole."""
    return checkpoint.with_name(f".draft_{checkpoint.name}")


def list_steps(work_dir: Path) -> list[Path]:
    """All that stands where checkpoints do, oldest step first, whole or not.

    The order is that of the steps: neither clocks nor the `latest` file, which a kill can leave one behind, decide.
    """
    return sorted(filter(is_step, checkpoints_directory(work_dir).glob("step_*")), key=step_of)


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Published checkpoints of a run, oldest step first; drafts and directories without a manifest are not listed."""
    return [path for path in list_steps(work_dir) if (path / MANIFEST).is_file()]


def is_step(path: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    return STEP_NAME.match(path.name) is not None


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
    if is_step(path):
        raise UserError(f"{path} has no {MANIFEST}: it is not a whole checkpoint. Copy it again or choose another.")
    checkpoints = list_checkpoints(work_dir_of(path))
    if not checkpoints:
        raise UserError(f"{path} holds no checkpoint. Give a work dir in which a run has saved one.")
    return checkpoints[-1].resolve()


def work_dir_of(path: Path) -> Path:
    """The work dir that is meant by a path which may be that of its checkpoints."""
    return path.parent if path.name == "checkpoints" else path


def begin_draft(final: Path, num_bytes: int) -> Path:
    """An empty directory to write a checkpoint of so many bytes into.

    Raises:
        OSError: the checkpoint is there already, or the disk has not that much room.
    """
    draft = draft_of(final)
    draft.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise FileExistsError(errno.EEXIST, f"{final} is there already")
    shutil.rmtree(draft, ignore_errors=True)
    check_room(draft.parent, num_bytes)
    draft.mkdir()
    return draft


def check_room(directory: Path, num_bytes: int) -> None:
    """OSError unless so many bytes fit on the disk now, which is no promise: writing can still fail."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:.2f} GB are needed on the disk, {free / 1e9:.2f} GB are free")


def publish(draft: Path, final: Path, entries: Mapping[str, Entry], facts: Mapping[str, Any]) -> None:
    """Make a draft whose files are on the disk the newest checkpoint; until the rename nobody sees any of it.

    Args:
        draft: where the files are.
        final: what it becomes.
        entries: of every file.
        facts: what else the manifest says: step, run, loss, ranks, versions.
    """
    write_manifest(draft, entries, facts)
    rename_draft(draft, final)
    write_text_atomically(final.parent / "latest", final.name + "\n")


def write_manifest(draft: Path, entries: Mapping[str, Entry], facts: Mapping[str, Any]) -> None:
    """The last file of a checkpoint, and all names of files forced to the disk."""
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(entries.items()))}
    manifest["sha256"] = hash_manifest(manifest)
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(draft / MANIFEST)
    for path in [*(path for path in draft.rglob("*") if path.is_dir()), draft]:
        sync(path)


def rename_draft(draft: Path, final: Path) -> None:
    """The moment from which on the checkpoint is there."""
    draft.rename(final)
    sync(final.parent)


def verify_checkpoint(directory: Path, world: World = ALONE) -> None:
    """Compare files with the manifest: all of them, or of several ranks each every n-th.

    Raises:
        UserError: naming the first file that is missing, shorter, longer, has other bytes or does not belong there.
    """
    check_sizes(directory)
    for name, entry in list(read_manifest(directory)["files"].items())[world.rank :: world.size]:
        if hash_file(directory / name) != entry["sha256"]:
            raise damaged(directory / name, "its bytes have another sha256 than the manifest says")


def check_sizes(directory: Path) -> None:
    """What can be seen of a checkpoint without reading it: names and sizes.

    Raises:
        UserError: naming the first file that is missing, shorter, longer or does not belong there.
    """
    manifest = read_manifest(directory)
    if is_step(directory) and manifest["step"] != step_of(directory):
        raise damaged(directory, f"its manifest is that of step {manifest['step']}")
    for name, entry in manifest["files"].items():
        check_size(directory / name, entry)
    for path in directory.glob("*.safetensors"):
        if path.name not in manifest["files"]:
            raise damaged(path, "the manifest does not know it")


def check_size(path: Path, entry: Entry) -> None:
    """UserError unless a file is there and as long as the manifest says."""
    if not path.is_file():
        raise damaged(path, "it is missing")
    if path.stat().st_size != entry["size"]:
        raise damaged(path, f"it has {path.stat().st_size} bytes, the manifest says {entry['size']}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """`files` (name -> Entry), `step`, `run` and what else `publish` was told; a damaged manifest is a UserError."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, checksum, files = manifest["format"], manifest.pop("sha256"), list(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"it cannot be read ({error})") from error
    if version != FORMAT:
        raise UserError(f"{directory} has checkpoint format {version}; this version of tuner reads {FORMAT}.")
    if checksum != hash_manifest(manifest):
        raise damaged(path, "its own sha256 does not fit")
    if outside := [name for name in files if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise damaged(path, f"it names files outside the checkpoint ({outside[0]})")
    return manifest


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file that is not what was saved."""
    return UserError(f"{path} is damaged: {reason}. Use another checkpoint, or a copy of this one.")


def prune(
    work_dir: Path, keep: int | None, *, every: int | None = None, best: bool = False, spare: Sequence[Path] = ()
) -> None:
    """Delete checkpoints that are not to be kept; call it after a new one is published.

    Args:
        work_dir: of the run.
        keep: how many of the newest stay; None keeps all.
        every: those at multiples of so many steps stay too.
        best: the one whose manifest says the lowest loss stays too.
        spare: others that stay for now.
    """
    present = list_checkpoints(work_dir)
    if keep is None:
        return
    kept = {*present[-keep:], *spare}
    kept |= {path for path in present if every and step_of(path) % every == 0}
    if best and (lowest := best_checkpoint(present)) is not None:
        kept.add(lowest)
    for path in present:
        if path not in kept:
            delete_checkpoint(path)


def best_checkpoint(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the lowest loss, of several the newest; None where none is known."""
    losses = {path: loss_of(path) for path in reversed(checkpoints)}
    known = [(loss, path) for path, loss in losses.items() if loss is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def loss_of(checkpoint: Path) -> float | None:
    """What a checkpoint's manifest says of the training loss before it; None where it says nothing, or is damaged."""
    try:
        return read_manifest(checkpoint)["loss"]
    except (UserError, KeyError):
        return None


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; half of it must never look whole."""
    doomed = path.with_name(f".deleted_{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that its step can be saved again; nothing of it is deleted."""
    aside = path.with_name(f"damaged_{path.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged_{path.name}_{number}")
    path.rename(aside)
    return aside


def remove_leftovers(work_dir: Path) -> None:
    """Delete drafts and half-deleted checkpoints of a run that was killed; only the holder of the lock may."""
    home = checkpoints_directory(work_dir)
    for path in [*home.glob(".draft_*"), *home.glob(".deleted_*")]:
        shutil.rmtree(path)


def copy_checkpoint(source: Path, home: Path) -> Path:
    """A copy of a checkpoint in another directory, written aside and read again before it gets its name.

    Raises:
        OSError: the disk refused, or another checkpoint of this step is there.
        UserError: the copy has other bytes than the manifest says.
    """
    final = home / source.name
    manifest = read_manifest(source)
    if final.exists():
        if read_manifest(final) == manifest:
            return final
        raise FileExistsError(errno.EEXIST, f"{final} is there already, and is another checkpoint")
    draft = begin_draft(final, sum(entry["size"] for entry in manifest["files"].values()))
    try:
        for name in [*manifest["files"], MANIFEST]:
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, draft / name)
            sync(draft / name)
        verify_checkpoint(draft)
        for path in [*(path for path in draft.rglob("*") if path.is_dir()), draft]:
            sync(path)
        rename_draft(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new content, also after a power cut."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """sha256 of all that the manifest says but this, so that a flipped digit in the manifest itself is found."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
