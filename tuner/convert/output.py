"""The directory that a conversion writes: whole or absent, and never over what is there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tuner.dataset.cache import sync
from tuner.errors import UserError


@contextmanager
def publishing(out: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """A draft directory beside `out` to write into; at the end of the block it becomes `out`.

    Args:
        out: does not exist yet, or is an empty directory.
        num_bytes: that are going to be written, about; it must have room for them.

    Raises:
        UserError: something is in `out`, the disk is full or refuses, a file that is read is damaged.
    """
    check_absent(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out, num_bytes)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
            draft = Path(name) / "draft"  # made by mkdir, for a temporary directory is its owner's alone
            draft.mkdir()
            yield draft
            for path in [*draft.rglob("*"), draft]:
                sync(path)
            check_absent(out)
            if out.exists():
                out.rmdir()
            draft.rename(out)
            sync(out.parent)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{out} was not written: {error.strerror or error}{place}. Nothing of it is left.") from error
    except SafetensorError as error:
        raise UserError(f"{out} was not written: a file that was read is damaged ({error}). Copy it again.") from error


def check_absent(out: Path) -> None:
    """Raise UserError where `out` is anything but absent or an empty directory."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; nothing was written. Choose another directory or remove it.")


def check_room(out: Path, num_bytes: int) -> None:
    """Raise UserError where the disk has less room than is needed, before half of it is written."""
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise UserError(
            f"{out} needs {num_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left; nothing was written. "
            "Make room, or choose another directory."
        )
