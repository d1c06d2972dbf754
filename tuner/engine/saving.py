"""When checkpoints are saved, how many stay, and what happens when the disk refuses."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.engine.checkpoint import best_checkpoint, checkpoint_path, list_checkpoints, prune, write_text_atomically
from tuner.engine.cold_storage import ColdStorage
from tuner.engine.frame import Hook
from tuner.engine.host_copies import HostCopies
from tuner.engine.hung_save import watch_save
from tuner.engine.pending_save import NonFiniteSaveError, PendingSave, SaveError
from tuner.engine.progress import CHECKPOINT
from tuner.engine.snapshot import take_snapshot
from tuner.engine.strategy import StepResult
from tuner.engine.together import PeerError, from_first, gather_objects
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner


class CheckpointHook(Hook):
    """Saves every `interval` steps and after the last one; deletes what is not to be kept once a new one is whole.

    A disk that refuses costs a warning while training can go on; for the last checkpoint it is an error.
    """

    priority = "LOW"

    def __init__(
        self,
        *,
        interval: int | None = 500,
        keep: int | None = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
        async_save: bool = False,
        copy_to: str | None = None,
    ) -> None:
        """When to save and what to keep.

        Args:
            interval: steps between checkpoints; None saves after the last one only.
            keep: how many of the newest stay; None keeps all.
            keep_every: those of steps that this divides stay too.
            keep_best: the one stays too before which the loss was lowest: the mean over the trained tokens since the
                checkpoint before.
            async_save: training waits only until tensors are copied to the host's memory, not until they are written.
            copy_to: a directory that gets a copy of each checkpoint, such as one on a disk for archives.
        """
        for name, value in (("save_interval", interval), ("keep_checkpoints", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: choose 1 or more, or None.")
        self.interval, self.keep, self.keep_every, self.keep_best = interval, keep, keep_every, keep_best
        self.copies = HostCopies() if async_save else None
        self.copy_to = None if copy_to is None else Path(copy_to).expanduser()
        self._pending: PendingSave | None = None
        self._untold: PendingSave | None = None
        self._held = ""
        self._loss_sum, self._num_loss_tokens = 0.0, 0

    def before_train(self, runner: "Runner") -> None:
        """Begin to measure."""
        self.cold = ColdStorage(self.copy_to, Path(runner.work_dir))
        self._since = time.perf_counter()

    def after_train_iter(
        self, runner: "Runner", batch_idx: int, data_batch: Sequence[Any], outputs: StepResult
    ) -> None:
        """Save where the interval or the end says so."""
        if not outputs.skipped:
            self._loss_sum += outputs.loss * outputs.num_loss_tokens
            self._num_loss_tokens += outputs.num_loss_tokens
        self._tell(runner)
        step = runner.strategy.step
        is_last = step == runner.train_loop.num_steps
        if is_last or (self.interval is not None and step % self.interval == 0):
            self.save(runner, is_last=is_last)

    def save(self, runner: "Runner", *, is_last: bool) -> None:
        """Save the step that is done; the last one is waited for. All ranks must call it.

        Raises:
            UserError: the last checkpoint could not be written, or what is to be saved is not finite.
        """
        started = time.perf_counter()
        with runner.strategy.progress.during(CHECKPOINT):
            self._settle(runner, is_last=False)
            self._tell(runner)
            self._begin(runner, is_last)
            if is_last or self.copies is None:
                self._settle(runner, is_last)
        now = time.perf_counter()
        held, since = now - started, now - self._since
        self._held = f"training waited {held:.2f} s, {held / since:.2%} of the time since the checkpoint before"
        self._since = now
        self._tell(runner)

    def before_stop(self, runner: "Runner") -> None:
        """The run ends after this step: save it, unless that has been done."""
        with runner.strategy.progress.during(CHECKPOINT):
            self._settle(runner, is_last=True)
        path = checkpoint_path(Path(runner.work_dir), runner.strategy.step)
        if not from_first(path.exists(), runner.strategy.world):
            self.save(runner, is_last=True)

    def before_rollback(self, runner: "Runner") -> None:
        """The run goes back to the last checkpoint: it has to be there."""
        with runner.strategy.progress.during(CHECKPOINT):
            self._settle(runner, is_last=False)
        self._tell(runner)

    def after_rollback(self, runner: "Runner") -> None:
        """The losses since that checkpoint come again."""
        self._loss_sum, self._num_loss_tokens = 0.0, 0

    def after_train(self, runner: "Runner") -> None:
        """Wait for the last checkpoint, and for its copy."""
        with runner.strategy.progress.during(CHECKPOINT):
            self._settle(runner, is_last=True)
            if runner.strategy.world.is_first:
                newest = next(reversed(list_checkpoints(Path(runner.work_dir))), None)
                self.cold.finish(newest, timeout=runner.train_loop.rank_timeout)
            gather_objects(None, runner.strategy.world)  # nobody ends before the copy is there
        self._tell(runner)

    def after_failure(self, runner: "Runner") -> None:
        """Training has failed: what is being written may still become a checkpoint to go on from."""
        if self._pending is not None:
            self._pending.leave()
            self._tell(runner)

    def _begin(self, runner: "Runner", is_last: bool) -> None:
        world = runner.strategy.world
        loss = self._loss_sum / self._num_loss_tokens if self._num_loss_tokens else None
        self._loss_sum, self._num_loss_tokens = 0.0, 0
        snapshot = take_snapshot(runner, loss=loss, copies=self.copies)
        try:
            self._pending = PendingSave(snapshot, Path(runner.work_dir), world, published=self._after_publishing)
        except (OSError, PeerError) as error:
            self._fail(runner, runner.strategy.step, error, is_last)
        else:
            self._untold = self._pending
            watch_save(self._pending, world, runner.strategy.progress, timeout=runner.train_loop.rank_timeout)

    def _settle(self, runner: "Runner", is_last: bool) -> None:
        """Wait for the save that is under way, if any; all ranks come to the same end of it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.settle()
        except NonFiniteSaveError as error:
            left = newest(Path(runner.work_dir))
            raise UserError(
                f"{error} is not finite: no checkpoint of step {pending.step} was published. {left}."
            ) from error
        except SaveError as error:
            is_told, self._untold = self._untold is None, None
            if is_last or not is_told:
                self._fail(runner, pending.step, error, is_last)

    def _fail(self, runner: "Runner", step: int, error: Exception, is_last: bool) -> None:
        problem = describe_failure(Path(runner.work_dir), step, str(error))
        if is_last:
            raise UserError(problem) from error
        if runner.strategy.world.is_first:
            warn(f"{problem} Training goes on.")

    def _tell(self, runner: "Runner") -> None:
        """Say what threads have done meanwhile; nobody is waited for."""
        if not runner.strategy.world.is_first:
            return
        for text in self.cold.take_messages():
            print(text, flush=True)
        pending = self._untold
        if pending is None or pending.is_under_way:
            return
        self._untold = None
        if pending.problem is not None:
            warn(f"{describe_failure(Path(runner.work_dir), pending.step, pending.problem)} Training goes on.")
            return
        size, seconds = pending.num_bytes / 1e9, pending.seconds
        print(f"saved {pending.path} ({size:.2f} GB in {seconds:.1f} s; {self._held})", flush=True)

    def _after_publishing(self, checkpoint: Path) -> None:
        """In the first rank's thread, once a checkpoint is there."""
        work_dir = checkpoint.parent.parent
        self.cold.start(checkpoint)
        spare = [path for path in [self.cold.under_way] if path is not None]
        try:
            prune(work_dir, self.keep, every=self.keep_every, best=self.keep_best, spare=spare)
            if self.keep_best and (best := best_checkpoint(list_checkpoints(work_dir))) is not None:
                write_text_atomically(checkpoint.parent / "best", best.name + "\n")
        except OSError as error:
            warn(f"An old checkpoint could not be deleted: {error}. Training goes on.")


def warn(text: str) -> None:
    """A line for whoever watches a run."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def describe_failure(work_dir: Path, step: int, problem: str) -> str:
    """What failed and what is left."""
    left = newest(work_dir)
    return (
        f"The checkpoint of step {step} could not be written: {problem}. {left}. If the disk is full, make room on it."
    )


def newest(work_dir: Path) -> str:
    """What a run can go on from."""
    whole = list_checkpoints(work_dir)
    return f"The newest whole checkpoint is {whole[-1]}" if whole else "There is no earlier checkpoint"
