"""Directories that are made once: locked while they are written, seen only when whole.

Locks are flock's. Machines that share a directory see each other's on NFSv4 and on Lustre mounted with `flock`; there
one process of all makes a directory. Where locks hold on each machine alone (Lustre with `localflock`), one process of
each machine makes it, the first to be done wins and the others drop theirs. Where there are none, a UserError says so.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tuner.errors import UserError

HASHED_AT_A_TIME = 1 << 20  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
WAIT_SECONDS, SAY_SECONDS = 0.1, 15.0  # between two tries to get a lock, and between two lines about waiting
TELL_SECONDS = 1.0  # between two states of its work that the holder of a lock tells
ABANDONED_SECONDS = 86400.0  # without a change, after which what another machine has begun is nobody's


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
    temporary = directory.with_name(f"{directory.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    temporary.mkdir()
    try:
        write(temporary)
        sync(temporary)
        try:
            temporary.rename(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return  # another machine, which does not see our locks, has made it meanwhile
        sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def one_at_a_time(parent: Path, name: str) -> Iterator[Callable[[str], None]]:
    """Let one process after the other do a work of this name; gives what tells those who wait how far it is.

    Where `parent` cannot be written nothing can be made, so all come in at once, to open what is there.
    """
    path = parent / f"{name}.lock"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise _mistake(error, parent) from error
        yield lambda state: None
        return
    said = 0.0

    def tell(state: str) -> None:
        nonlocal said
        if time.monotonic() - said > TELL_SECONDS:
            said = time.monotonic()
            path.write_text(state, encoding="utf-8")

    with _locked(path):
        try:
            yield tell
        finally:
            os.truncate(path, 0)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; gives False, without it, if another process has it and `wait` is False."""
    with open(path, "ab") as file:
        if not _try_to_lock(file, path):
            if not wait:
                yield False
                return
            _wait_for_lock(file, path)
        yield True


def _try_to_lock(file: IO[bytes], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"The file system of {path.parent} has no locks ({error.strerror}), by which processes agree on who "
            "prepares data. Set cache_dir to another one, such as a local disk, or mount Lustre with -o flock."
        ) from error
    return True


def _wait_for_lock(file: IO[bytes], path: Path) -> None:
    print(f"Another process is preparing the same data; waiting for it ({path})", flush=True)
    started = said = time.monotonic()
    while not _try_to_lock(file, path):
        time.sleep(WAIT_SECONDS)
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            state = path.read_text(encoding="utf-8", errors="replace")
            print(f"waiting for data, {said - started:.0f} s{f': {state}' if state else ''}", flush=True)


def _remove_leftovers(parent: Path, *, own: str) -> None:
    """Temporary directories of processes that died: those whose lock is free, or ours."""
    for leftover in parent.glob("*.tmp-*"):
        name, _, maker = leftover.name.rpartition(".tmp-")
        if not maker.startswith(f"{socket.gethostname()}-") and not _is_abandoned(leftover):
            continue  # of another machine, whose locks may not be seen here
        if name == own:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with _locked(parent / f"{name}.lock", wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(directory: Path) -> bool:
    try:
        changed = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
    except FileNotFoundError:
        return False  # it is under work, or already gone
    return time.time() - changed > ABANDONED_SECONDS


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
