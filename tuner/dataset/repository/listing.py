"""The files of a tree of source code, or of a directory of such trees, as the file system has them; none is opened."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tuner.dataset.repository.kinds import foreign_directory, foreign_name
from tuner.errors import UserError

KIND = "repository"  # what stands for the ending of a directory


class Found(NamedTuple):
    """A file to be read, its path from the root of its repository with /, and what the file system says of it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Repository(NamedTuple):
    """One tree: its directory, its files in the order of their paths, and how many others there are, by reason."""

    root: Path
    files: list[Found]
    left_out: Counter[str]


def repositories(root: Path) -> list[Repository]:
    """The repository that a directory is; where it has no file of its own, those that its directories are, by name.

    Raises:
        UserError: a directory that cannot be read, or vanishes.
    """
    entries = _entries(root)
    inner = [entry.name for entry in entries if _is_directory(entry) and not foreign_directory(entry.name)]
    is_one = any(entry.name == ".git" or (_is_file(entry) and entry.name[0] != ".") for entry in entries)
    if is_one or not inner:
        return [_repository(root)]
    found = [_repository(root / name) for name in inner]
    found[0].left_out.update("links" for entry in entries if entry.is_symlink())
    return found


def tree_state(root: Path) -> tuple[int, int, int, int]:
    """Bytes of all files, newest mtime and ctime in ns, and a number that changes with anything of any of them."""
    found = repositories(root)
    files = [file for each in found for file in each.files]
    listed = [[os.fsencode(each.root.name).hex(), each.files, sorted(each.left_out.items())] for each in found]
    number = int(hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:15], 16)
    newest, changed = (
        max((file.mtime_ns for file in files), default=0),
        max((file.ctime_ns for file in files), default=0),
    )
    return sum(file.size for file in files), newest, changed, number


def told(names: Counter[str]) -> str:
    """For a person: how many files are left out, by reason, the most first."""
    return ", ".join(
        f"{number:,} {reason}" for reason, number in sorted(names.items(), key=lambda pair: (-pair[1], pair))
    )


def _repository(root: Path) -> Repository:
    left_out: Counter[str] = Counter()
    return Repository(root, sorted(_walk(root, left_out)), left_out)


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Found]:
    """Links are not followed: what they name inside the tree comes anyway, what is outside does not belong to it."""
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        for entry in _entries(directory):
            if entry.is_symlink():
                left_out["links"] += 1
            elif _is_directory(entry):
                reason = foreign_directory(entry.name)
                left_out.update([reason] if reason else [])
                waiting += [] if reason else [Path(entry.path)]
            elif not _is_file(entry):
                left_out["pipes, sockets or devices"] += 1
            else:
                yield from _looked_at(entry, root, left_out)


def _looked_at(entry: "os.DirEntry[str]", root: Path, left_out: Counter[str]) -> Iterator[Found]:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as error:
        raise mistake(Path(entry.path), error) from error
    path = Path(entry.path).relative_to(root).as_posix()
    reason = foreign_name(entry.name, status.st_size) or ("" if path.isprintable() and "`" not in path else "odd")
    if reason:
        left_out["with names that are no plain text" if reason == "odd" else reason] += 1
        return
    yield Found(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _entries(directory: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise mistake(directory, error) from error


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    return entry.is_file(follow_symlinks=False)


def mistake(path: Path, error: OSError) -> UserError:
    """What to say of a file or directory of a tree that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} was removed while its tree was being read. Start again once it is complete.")
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read by this user. Change its permissions, or take it out of the tree.")
    return UserError(f"{path} cannot be read: {error.strerror or error}. Mend it, or take it out of the tree.")
