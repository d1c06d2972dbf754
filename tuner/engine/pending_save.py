"""A checkpoint on its way to the disk, written by a thread of every rank while training goes on."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tuner.engine.checkpoint import begin_draft, checkpoint_path, draft_of, publish
from tuner.engine.draft import GivenUpError, gather_notes, note_failed, note_written
from tuner.engine.snapshot import Snapshot, write_snapshot
from tuner.engine.tensor_files import NonFiniteTensorError
from tuner.engine.together import all_or_none, gather_objects
from tuner.engine.world import World

WRITE_FAILURES = (OSError, NonFiniteTensorError, GivenUpError)
"""what may go wrong without a mistake in the code; others end the run"""
WRITES, WAITS, PUBLISHES = "writes its files", "waits for the files of rank", "makes the checkpoint whole"
"""parts of a save, for messages"""
SHUTDOWN_SECONDS = 60.0
"""how long a run that has failed waits for its last checkpoint"""


class SaveError(RuntimeError):
    """A checkpoint did not come about; the message says on which rank and why. No rank has it."""


class NonFiniteSaveError(SaveError):
    """It has a NaN or an infinity: what is trained is lost."""


class PendingSave:
    """Written by a thread of this rank, published by that of the first rank once all have written.

    No thread takes part in a collective: those belong to training. What failed is said when `settle` is called.
    """

    def __init__(self, snapshot: Snapshot, work_dir: Path, world: World, *, published: Callable[[Path], None]) -> None:
        """Make the draft; all ranks must call it.

        Args:
            snapshot: this rank's part; its tensors may not change until `settle` has returned.
            work_dir: of the run.
            world: this rank.
            published: called in the first rank's thread with the checkpoint once it is there.

        Raises:
            OSError: no room, on the first rank.
            PeerError: the same, on others.
        """
        self.step = snapshot.step
        self.num_bytes = sum(gather_objects(snapshot.num_bytes, world))
        self.path = checkpoint_path(work_dir, snapshot.step)
        self.seconds = 0.0  # from here until the checkpoint is there
        self.part = WRITES  # where this rank's thread is
        self._snapshot, self._world, self._published = snapshot, world, published
        self._written, self._given_up = threading.Event(), threading.Event()
        self._write_error: Exception | None = None
        self._publish_error: Exception | None = None
        with all_or_none(world, (OSError,)):
            if world.is_first:
                begin_draft(self.path, self.num_bytes)
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name=f"save-{self.step}", daemon=True)
        self._thread.start()

    @property
    def is_under_way(self) -> bool:
        """Whether this rank's thread is still at work on it."""
        return self._thread.is_alive()

    @property
    def thread_id(self) -> int:
        """Of this rank's thread, as threading counts them."""
        return self._thread.ident or 0

    def wait(self, seconds: float) -> bool:
        """Wait for this rank's thread for so long; whether it is done."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def problem(self) -> str | None:
        """What this rank knows to have failed so far."""
        error = self._write_error or self._publish_error
        return None if error is None else str(error)

    def settle(self) -> None:
        """Wait until it is published, or has failed on any rank; all ranks must call it.

        Raises:
            SaveError: on all ranks alike.
        """
        self._written.wait()
        problem = self._common(self._write_error)
        if problem is not None:
            self._given_up.set()  # a full disk may not have taken the note of it
        self._thread.join()
        problem = problem or self._common(self._publish_error)
        if problem is not None:
            if self._world.is_first:
                shutil.rmtree(draft_of(self.path), ignore_errors=True)
            raise problem

    def leave(self) -> None:
        """Wait for this rank's thread, but not for ever: the run has failed, and other ranks may be gone."""
        self._thread.join(SHUTDOWN_SECONDS)

    def _common(self, error: Exception | None) -> SaveError | None:
        """What all ranks say failed, if on any; one that is a mistake in the code is raised where it happened."""
        own = None if error is None else (isinstance(error, NonFiniteTensorError), str(error))
        reports = gather_objects(own, self._world)
        if error is not None and not isinstance(error, WRITE_FAILURES):
            raise error
        failed = [(*report, rank) for rank, report in enumerate(reports) if report is not None]
        if not failed:
            return None
        is_value, text, rank = max(failed, key=lambda report: (report[0], -report[2]))
        said = text if self._world.size == 1 else f"rank {rank}: {text}"
        return NonFiniteSaveError(said) if is_value else SaveError(said)

    def _wait_for(self, rank: int) -> None:
        self.part = f"{WAITS} {rank}"

    def _run(self) -> None:
        draft = draft_of(self.path)
        try:
            note_written(draft, self._world, write_snapshot(self._snapshot, draft, self._world))
        except Exception as error:  # told by `settle`, of whatever kind
            self._write_error = error
            note_failed(draft, self._world, str(error))
            return
        finally:
            self._written.set()
        if not self._world.is_first:
            return
        try:
            entries = gather_notes(draft, self._world, self._given_up, waits_for=self._wait_for)
            self.part = PUBLISHES
            publish(draft, self.path, entries, self._snapshot.facts)
            self.seconds = time.perf_counter() - self._started
            self._published(self.path)
        except Exception as error:  # told by `settle`, of whatever kind
            self._publish_error = error
