"""When checkpoints are saved, how many stay, and what happens when the disk refuses."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook
from safetensors import SafetensorError

from tuner.engine.checkpoint import list_checkpoints, prune
from tuner.engine.progress import CHECKPOINT
from tuner.engine.snapshot import save_snapshot
from tuner.engine.strategy import NonFiniteStepError, StepResult
from tuner.engine.together import PeerError, all_or_none
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner


class CheckpointHook(Hook):
    """Saves every `interval` steps and after the last one; deletes all but the newest `keep` once a new one is whole.

    A disk that refuses costs a warning while training can go on; for the last checkpoint it is an error.
    """

    priority = "LOW"

    def __init__(self, *, interval: int | None = 500, keep: int | None = 2) -> None:
        if interval is not None and interval < 1:
            raise UserError(f"save_interval={interval}: choose 1 or more steps, or None to save at the end only.")
        if keep is not None and keep < 1:
            raise UserError(f"keep_checkpoints={keep}: choose 1 or more, or None to keep all.")
        self.interval = interval
        self.keep = keep

    def after_train_iter(
        self, runner: "Runner", batch_idx: int, data_batch: Sequence[Any], outputs: StepResult
    ) -> None:
        """Save where the interval or the end says so."""
        step = runner.strategy.step
        is_last = step == runner.train_loop.num_steps
        if is_last or (self.interval is not None and step % self.interval == 0):
            with runner.strategy.progress.during(CHECKPOINT):
                self._save(runner, is_last)

    def _save(self, runner: "Runner", is_last: bool) -> None:
        work_dir, world = Path(runner.work_dir), runner.strategy.world
        started = time.perf_counter()
        try:
            checkpoint = save_snapshot(runner)
            with all_or_none(world, (OSError,)):
                if world.is_first:
                    prune(work_dir, self.keep)
        except NonFiniteStepError as error:
            raise UserError(f"{error} is not finite: no checkpoint was written. {newest(work_dir)}.") from error
        except (OSError, SafetensorError, PeerError) as error:
            problem = describe_failure(work_dir, runner.strategy.step, error)
            if is_last:
                raise UserError(problem) from error
            if world.is_first:
                print(f"warning: {problem} Training goes on.", file=sys.stderr, flush=True)
            return
        if world.is_first:
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            print(f"saved {checkpoint} ({size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s)", flush=True)


def describe_failure(work_dir: Path, step: int, error: Exception) -> str:
    """What failed and what is left."""
    left = newest(work_dir)
    return f"The checkpoint of step {step} could not be written: {error}. {left}. If the disk is full, make room on it."


def newest(work_dir: Path) -> str:
    """What a run can go on from."""
    whole = list_checkpoints(work_dir)
    return f"The newest whole checkpoint is {whole[-1]}" if whole else "There is no earlier checkpoint"
