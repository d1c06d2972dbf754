"""The training loop: batches in, optimizer steps out, hooks around each, a clear end where it is asked for or due."""

import json
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from tuner.dataset.group_signals import held_back
from tuner.dataset.sampler import StepPlan
from tuner.dataset.staged import StagedDataset
from tuner.engine.bad_steps import Action, BadSteps
from tuner.engine.checkpoint import list_checkpoints, write_text_atomically
from tuner.engine.frame import BaseLoop
from tuner.engine.progress import DATA, HOOKS
from tuner.engine.randomness import random_state_kept
from tuner.engine.stages import border
from tuner.engine.stop import Stop, reason
from tuner.engine.strategy import Batch, RefusedStepError, SpikeError, StepResult
from tuner.engine.together import gather_objects
from tuner.engine.world import in_ranges
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

RANK_TIMEOUT = 1800.0
REFUSED = ("nonfinite", "spike", "spoiled")
NUM_NAMED = 8  # documents of a step that a killed rank leaves the names of


class NonFiniteError(UserError):
    """Training met a NaN, an infinity or a spike and stopped; the message says where the documents' ids are."""


class TrainLoop(BaseLoop):
    """Counts optimizer steps; how many there are, over epochs or `max_steps`, the data loader's sampler knows."""

    def __init__(
        self,
        runner: "Runner",
        dataloader: DataLoader,
        rank_timeout: float = RANK_TIMEOUT,
        *,
        on_nonfinite: Action = "skip",
        max_nonfinite_steps: int = 3,
        spike_factor: float | None = None,
        rollback_steps: int = 1,
    ) -> None:
        """What to do about steps that are not finite, as `BadSteps` takes it.

        `rank_timeout`: seconds to wait for a rank that does not come; train.py watches from before the loop.
        """
        super().__init__(runner, dataloader)
        self.rank_timeout = rank_timeout
        self.num_steps = len(dataloader.sampler)
        self.num_loss_tokens = 0  # trained tokens of all steps so far, of the runs before a resume too
        self.step_seconds = 0.0  # of the last step, waiting included
        self.bad_steps = BadSteps(
            on_nonfinite=on_nonfinite,
            max_nonfinite_steps=max_nonfinite_steps,
            spike_factor=spike_factor,
            rollback_steps=rollback_steps,
        )
        self.stop = Stop(Path(runner.work_dir), runner.strategy.world)
        self.stopped_by = ""
        """who ended the run before its last step, when all is saved; for a person"""

    @property
    def epoch(self) -> int:
        """Epoch of the last step, counted from 0."""
        return self.dataloader.sampler.plan(max(self.runner.strategy.step - 1, 0)).epoch

    def run(self) -> None:
        """Train from the strategy's step to the last one, or to the one after which the run is asked to end."""
        strategy = self.runner.strategy
        self.runner.call_hook("before_train")
        with self.stop.heeded():
            iterator = self._batches()
            while strategy.step < self.num_steps and not self.stopped_by:
                started = time.perf_counter()
                strategy.progress.enter(DATA, step=strategy.step + 1)
                self._enter_stage()
                batches = next(iterator)
                if strategy.world.size > 1:
                    strategy.progress.documents = self._first_documents(strategy.step)
                result = self._step(batches)
                strategy.progress.enter(HOOKS)
                self.step_seconds = time.perf_counter() - started
                if result.skip in REFUSED and self._go_back(result):
                    iterator = self._batches()
                else:
                    self._after_step(batches, result)
                if result.tally.stop and strategy.step < self.num_steps:
                    self.stopped_by = reason(result.tally, self.stop)
            if self.stopped_by:
                self.runner.call_hook("before_stop")
            self.runner.call_hook("after_train")
            self._tell_stop()

    def _enter_stage(self) -> None:
        """Turn as the stage of the step to come says, on each rank; say it where one begins."""
        step = self.runner.strategy.step
        self.runner.enter_stage(step)
        if (text := border(self.dataloader.dataset, step, self.runner.rope_base)) is not None:
            self._say(text)

    def stage_columns(self) -> dict[str, int]:
        """Of the last step, the stage, counted from 1; nothing in a run without stages."""
        dataset = self.dataloader.dataset
        if not isinstance(dataset, StagedDataset):
            return {}
        return {"stage": dataset.place(max(self.runner.strategy.step - 1, 0)) + 1}

    def _batches(self) -> Iterator[Sequence[Batch]]:
        """This rank's micro-batches of the steps to come."""
        self.dataloader.sampler.seek(self.runner.strategy.step)
        with random_state_kept(), held_back():  # starting draws a seed, which an uninterrupted run does not do
            return iter(self.dataloader)

    def _step(self, batches: Sequence[Batch]) -> StepResult:
        """One step; a bad one counts, too, but leaves weights and optimizer as they are.

        Raises:
            NonFiniteError: it is one too many, or the settings want no other.
        """
        strategy, bad = self.runner.strategy, self.bad_steps
        if strategy.step in bad.passed:
            return strategy.step_over()
        try:
            result = strategy.train_step(batches, stop=self.stop.asked, loss_limit=bad.loss_limit)
        except RefusedStepError as error:
            if bad.refuse(strategy.step) == "stop":
                raise self._end(error) from error
            self._report(error)
            strategy.step += 1
            return error.result
        self.num_loss_tokens += 0 if result.skip else result.num_loss_tokens
        if not result.skip:
            bad.keep(result.loss)
        return result

    def _go_back(self, result: StepResult) -> bool:
        """After a bad step, where settings say so: on from the last checkpoint; False where the run just goes on.

        Raises:
            NonFiniteError: the step has spoiled the weights, and there is no checkpoint to go back to.
        """
        step, is_spoiled = self.runner.strategy.step - 1, result.skip == "spoiled"
        if self.bad_steps.on_nonfinite != "rollback" and not is_spoiled:
            return False
        if not self.runner.go_back():
            if is_spoiled:
                raise NonFiniteError(
                    f"The gradient of step {step + 1} of {self.num_steps} was not finite, which optimizer_in_backward "
                    "found out when the weights had moved by it. There is no checkpoint to go back to. Its documents "
                    f"are listed in nonfinite_step_{step + 1}.json in the work dir. Look at them, lower lr, or set "
                    "optimizer_in_backward=False, which skips such a step, and start again."
                )
            self._say(f"step {step + 1} was {result.skip}; there is no checkpoint to go back to: it is skipped")
            return False
        over = [number + 1 for number in self.bad_steps.step_over(step)]
        back = self.runner.strategy.step
        self._say(f"step {step + 1} was {result.skip}: back to step {back}; stepping over {in_ranges(over)} this time")
        return True

    def _after_step(self, batches: Sequence[Batch], result: StepResult) -> None:
        step = self.runner.strategy.step
        self.runner.call_hook("after_train_iter", batch_idx=step - 1, data_batch=batches, outputs=result)

    def _tell_stop(self) -> None:
        if self.stopped_by and self.runner.strategy.world.is_first:
            self.stop.file.unlink(missing_ok=True)
            step = f"step {self.runner.strategy.step} of {self.num_steps}"
            self._say(f"stopped {self.stopped_by} after {step}, which is saved. Go on with --resume auto.")

    def _say(self, text: str) -> None:
        if self.runner.strategy.world.is_first:
            print(text, flush=True)

    def _first_documents(self, step: int) -> list[str]:
        """A few of those that this rank has in `step` (counted from 0)."""
        plan = self.dataloader.sampler.plan(step)
        first = tuple(chain.from_iterable(plan.packs))[:NUM_NAMED]
        return self.dataloader.dataset.document_ids(plan._replace(packs=(first,)))

    def _report(self, error: RefusedStepError) -> Path:
        """Save what was in the batches of all ranks in the bad step under way; returns the file."""
        step, world = self.runner.strategy.step, self.runner.strategy.world
        path = Path(self.runner.work_dir) / f"nonfinite_step_{step + 1}.json"
        own = self.dataloader.dataset.document_ids(self.dataloader.sampler.plan(step))
        documents = list(dict.fromkeys(chain.from_iterable(gather_objects(own, world))))
        if world.is_first:
            ranks = list(error.result.tally.nonfinite_ranks)
            report = {"step": step + 1, "problem": str(error), "ranks": ranks, "documents": documents}
            write_text_atomically(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        return path

    def _end(self, error: RefusedStepError) -> NonFiniteError:
        """What to say of the bad step that ends the run."""
        path, step, bad = self._report(error), self.runner.strategy.step, self.bad_steps
        number = bad.num_in_a_row(step)
        problem = "is a spike" if isinstance(error, SpikeError) else "is not finite"
        many = f", the last of {number} bad steps in a row" if number > 1 else ""
        remedy = "go on with --resume" if list_checkpoints(Path(self.runner.work_dir)) else "start again"
        return NonFiniteError(
            f"Step {step + 1} of {self.num_steps} {problem} ({error}){many}; training stopped, and no checkpoint of it "
            f"was written. Its documents are listed in {path}. Look at them, lower lr or max_grad_norm, and {remedy}."
        )


def documents_of_rank(dataloader: DataLoader, step: int, place: int, num_places: int) -> list[str]:
    """The documents of a step (counted from 0) that the data-parallel rank `place` of so many takes."""
    taken = dataloader.sampler.of_all_ranks(step)
    packs = tuple(tuple(map(int, pack)) for pack in taken.packs[place::num_places])
    return dataloader.dataset.document_ids(StepPlan(step, taken.epoch, packs, taken.num_loss_tokens))
