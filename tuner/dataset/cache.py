"""Directories that are made once: locked while they are written, seen only when whole."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.errors import UserError

HASHED_AT_A_TIME = 1 << 20  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_once(
    directory: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool], *, wait: bool = True
) -> bool:
    """Unless `directory` is whole, let `write` fill a temporary one and rename that; whether this call did so.

    Among processes that ask at once, one writes; the others wait for it, or do nothing if `wait` is False. A process
    that dies half-way leaves a temporary directory, which nobody opens and the next build removes. Raises UserError
    when the disk is full.
    """
    parent = directory.parent
    with writing(parent), _locked(parent / f"{directory.name}.lock", wait=wait) as is_ours:
        if not is_ours or is_whole(directory):
            return False
        if directory.exists():
            print(f"{directory} is damaged or out of date; it is made again", flush=True)
            shutil.rmtree(directory)
        _remove_leftovers(parent, own=directory.name)
        _write_and_rename(directory, write)
        return True


@contextmanager
def writing(parent: Path) -> Iterator[None]:
    """Make a directory to write into; what the disk refuses becomes a UserError that says what to do."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _mistake(error, parent) from error


def _write_and_rename(directory: Path, write: Callable[[Path], None]) -> None:
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        write(temporary)
        sync(temporary)
        temporary.rename(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; gives False, without it, if another process has it and `wait` is False."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            print(f"Another run is preparing the same data; waiting for it ({path})", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def _remove_leftovers(parent: Path, *, own: str) -> None:
    """Temporary directories of processes that died: those whose lock is free, or ours."""
    for leftover in parent.glob("*.tmp-*"):
        name = leftover.name.rsplit(".tmp-", 1)[0]
        if name == own:
            shutil.rmtree(leftover)
            continue
        with _locked(parent / f"{name}.lock", wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk, so that a rename outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_AT_A_TIME):
            digest.update(block)
    return digest.hexdigest()


def _mistake(error: OSError, parent: Path) -> Exception:
    if error.errno in DISK_FULL:
        return UserError(
            f"The disk is full: shards could not be written to {parent} ({error.strerror}). Nothing of them is kept. "
            "Free some space, or set cache_dir to a directory on a larger disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"Shards cannot be written to {parent} ({error.strerror}). Set cache_dir elsewhere.")
    return error
