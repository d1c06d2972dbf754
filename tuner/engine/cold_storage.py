"""Copies of checkpoints in a second place, such as a slow and large disk, made by a thread beside training."""

import threading
from pathlib import Path

from tuner.engine.checkpoint import checkpoints_directory, copy_checkpoint
from tuner.engine.hung_save import SLOWEST_DISK
from tuner.errors import UserError

COPIES_AT_THE_END = 2  # the one that is under way, and that of the last checkpoint


class ColdStorage:
    """One copy at a time, of the first rank; what fails is a warning, since the checkpoint itself is there.

    Args:
        directory: below it are the copies of a run as in its work dir, under the work dir's name; None copies nothing.
        work_dir: of the run.
    """

    def __init__(self, directory: Path | None, work_dir: Path) -> None:
        self.home = None if directory is None else checkpoints_directory(directory / work_dir.name)
        self.under_way: Path | None = None
        self._thread: threading.Thread | None = None
        self._said: list[str] = []

    def start(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint, which must stay until that is done; one too many is left out, and said."""
        if self.home is None:
            return
        if self.under_way is not None:
            self._said.append(
                f"warning: {checkpoint.name} is not copied to {self.home}: {self.under_way.name} is still on its way. "
                "Save less often, or copy to a faster disk."
            )
            return
        self.under_way = checkpoint
        self._thread = threading.Thread(target=self._copy, args=(checkpoint, self.home), daemon=True)
        self._thread.start()

    def take_messages(self) -> list[str]:
        """What there is to say since the last call."""
        said, self._said = self._said, []
        return said

    def finish(self, checkpoint: Path | None, *, timeout: float) -> None:
        """Wait for the copy that is under way, and see to it that the run's last checkpoint has one.

        A disk that does not answer is waited for `timeout` seconds and as long as SLOWEST_DISK takes for the bytes, and
        is a warning then: the checkpoint itself is there.
        """
        if self.home is None or checkpoint is None:
            return
        last = threading.Thread(target=self._finish, args=(checkpoint, self.home, self._thread), daemon=True)
        last.start()
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*"))
        limit = timeout + COPIES_AT_THE_END * num_bytes / SLOWEST_DISK
        last.join(limit)
        if last.is_alive():
            self._said.append(
                f"warning: after {limit:.0f} s {checkpoint.name} is still not copied to {self.home}. Does that disk "
                f"answer? The checkpoint is whole in {checkpoint.parent}: copy it from there."
            )

    def _finish(self, checkpoint: Path, home: Path, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        if not (home / checkpoint.name).exists():
            self._copy(checkpoint, home)

    def _copy(self, checkpoint: Path, home: Path) -> None:
        try:
            self._said.append(f"copied to {copy_checkpoint(checkpoint, home)}")
        except (OSError, UserError) as error:
            self._said.append(f"warning: {checkpoint.name} could not be copied to {home}: {error}")
        finally:
            self.under_way = None
