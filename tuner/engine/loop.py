"""The training loop: batches in, optimizer steps out, hooks around each, a clear stop where a number is not finite."""

import json
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from tuner.dataset.sampler import StepPlan
from tuner.engine.checkpoint import list_checkpoints, write_text_atomically
from tuner.engine.frame import BaseLoop
from tuner.engine.progress import DATA, HOOKS
from tuner.engine.randomness import random_state_kept
from tuner.engine.strategy import NonFiniteStepError
from tuner.engine.together import gather_objects
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

RANK_TIMEOUT = 1800.0
NUM_NAMED = 8  # documents of a step that a killed rank leaves the names of


class NonFiniteError(UserError):
    """Training met a NaN or an infinity and stopped; the message says where the documents' ids are."""


class TrainLoop(BaseLoop):
    """Counts optimizer steps; how many there are, over epochs or `max_steps`, the data loader's sampler knows."""

    def __init__(self, runner: "Runner", dataloader: DataLoader, rank_timeout: float = RANK_TIMEOUT) -> None:
        """`rank_timeout`: seconds to wait for a rank that does not come; train.py watches from before the loop."""
        super().__init__(runner, dataloader)
        self.rank_timeout = rank_timeout
        self.num_steps = len(dataloader.sampler)
        self.num_loss_tokens = 0  # trained tokens of all steps so far, of the runs before a resume too
        self.step_seconds = 0.0  # of the last step, waiting included

    @property
    def epoch(self) -> int:
        """Epoch of the last step, counted from 0."""
        return self.dataloader.sampler.plan(max(self.runner.strategy.step - 1, 0)).epoch

    def run(self) -> None:
        """Train from the strategy's step to the last one."""
        strategy, sampler = self.runner.strategy, self.dataloader.sampler
        self.runner.call_hook("before_train")
        sampler.seek(strategy.step)
        with random_state_kept():  # starting an iterator draws a seed, which an uninterrupted run does not do
            iterator = iter(self.dataloader)
        while strategy.step < self.num_steps:
            started = time.perf_counter()
            strategy.progress.enter(DATA, step=strategy.step + 1)
            batches = next(iterator)
            if strategy.world.size > 1:
                strategy.progress.documents = self._first_documents(strategy.step)
            try:
                result = strategy.train_step(batches)
            except NonFiniteStepError as error:
                raise self._report(strategy.step, error) from error
            strategy.progress.enter(HOOKS)
            self.step_seconds = time.perf_counter() - started
            self.num_loss_tokens += result.num_loss_tokens
            self.runner.call_hook("after_train_iter", batch_idx=strategy.step - 1, data_batch=batches, outputs=result)
        self.runner.call_hook("after_train")

    def _first_documents(self, step: int) -> list[str]:
        """A few of those that this rank has in `step` (counted from 0)."""
        plan = self.dataloader.sampler.plan(step)
        first = tuple(chain.from_iterable(plan.packs))[:NUM_NAMED]
        return self.dataloader.dataset.document_ids(plan._replace(packs=(first,)))

    def _report(self, step: int, error: NonFiniteStepError) -> NonFiniteError:
        """Save what was in the batch of `step` (counted from 0)."""
        path, world = Path(self.runner.work_dir) / f"nonfinite_step_{step}.json", self.runner.strategy.world
        own = self.dataloader.dataset.document_ids(self.dataloader.sampler.plan(step))
        documents = list(dict.fromkeys(chain.from_iterable(gather_objects(own, world))))
        if world.is_first:
            report = {"step": step, "problem": str(error), "documents": documents}
            write_text_atomically(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        remedy = "go on with --resume" if list_checkpoints(Path(self.runner.work_dir)) else "start again"
        return NonFiniteError(
            f"Step {step} of {self.num_steps} is not finite ({error}); training stopped, no checkpoint was written. "
            f"Its documents are listed in {path}. Look at them, lower lr or max_grad_norm, and {remedy}."
        )


def documents_of_rank(dataloader: DataLoader, step: int, place: int, num_places: int) -> list[str]:
    """The documents of a step (counted from 0) that the data-parallel rank `place` of so many takes."""
    taken = dataloader.sampler.of_all_ranks(step)
    packs = tuple(tuple(map(int, pack)) for pack in taken.packs[place::num_places])
    return dataloader.dataset.document_ids(StepPlan(step, taken.epoch, packs, taken.num_loss_tokens))
