"""Files that are written for a user: made with their directory, and never over what is there."""

import os
from pathlib import Path
from typing import TextIO

from tuner.errors import UserError


def check_new(path: Path) -> None:
    """Raise UserError where `open_new` would find the file there already, or a file in the place of its directory."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; nothing was written. Choose another name.")
    if os.path.lexists(path.parent) and not os.path.isdir(path.parent):
        raise UserError(f"{path.parent} is a file, so {path.name} cannot lie in it. Choose another directory.")


def open_new(path: Path) -> TextIO:
    """A text file that did not exist before. Raises UserError where it does, or cannot be made."""
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("x", encoding="utf-8", errors="backslashreplace")  # half of a surrogate pair has no bytes
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def write_new(path: Path, content: str | bytes) -> None:
    """A file with this content that did not exist before. Raises UserError where it does, or cannot be written."""
    file = open_new(path)
    try:
        with file:
            if isinstance(content, str):
                file.write(content)
            else:
                file.buffer.write(content)
    except OSError as error:  # a disk that is full; half a file would only be in the way
        path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
