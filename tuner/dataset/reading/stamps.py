"""What the file system says of a file, to notice one that changes while it is read."""

import stat
from pathlib import Path
from typing import NamedTuple

from tuner.dataset.repository.listing import tree_state
from tuner.errors import UserError


class Stamp(NamedTuple):
    """The state of a file; ctime moves even when an editor puts mtime back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def stamp(path: Path) -> Stamp:
    """The present state of a file, or of all that is read of a directory."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return Stamp(*tree_state(path))
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def check_unchanged(path: Path, before: Stamp) -> None:
    """Raises UserError if a file is no longer what it was."""
    try:
        after = stamp(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} was removed while it was being read. Start again once it is complete.") from error
    if after != before:
        raise UserError(f"{path} changed while it was being read. Start again once it is complete.")
