"""Which packs each optimizer step takes, as a function of the step: resuming is asking for a later one."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.ordering import IntArray
from tuner.dataset.packing import Packs
from tuner.errors import UserError

ENDLESS = (
    "With streaming = True nobody knows how long an epoch is before it has been read, so num_epochs does not end the "
    "run. Give max_steps, the number of optimizer steps."
)


class StepPlan(NamedTuple):
    """What one rank does in one optimizer step; steps count from 0.

    `packs` has the document numbers of each micro-batch; an empty one is a micro-batch without loss, for a rank that
    has fewer packs than others at the end of an epoch. `num_loss_tokens` is of the whole step, over all ranks:
    an int, or the sum of the labels' weights where some label of the data does not weigh 1.
    """

    step: int
    epoch: int
    packs: tuple[tuple[int, ...], ...]
    num_loss_tokens: float


class Packed(Protocol):
    """What the sampler needs of a dataset; `PackedDataset` is one."""

    @property
    def num_packs(self) -> int:
        """Packs of an epoch, the same in each."""

    @property
    def num_loss_tokens(self) -> IntArray | NDArray[np.float64]:
        """(documents,) labels of each document, at least one, each counted as it weighs in the loss."""

    def packs(self, epoch: int) -> Packs:
        """The epoch's packs in order, from the seed and the epoch alone."""


class StepPacks(NamedTuple):
    """What all ranks together take in a step: documents (documents,) of each pack; counts as in StepPlan."""

    epoch: int
    packs: list[IntArray]
    num_loss_tokens: float


@runtime_checkable
class Streamed(Protocol):
    """A dataset whose packs go on and on, and nobody knows how many an epoch has; `StreamedDataset` is one."""

    def step_packs(self, step: int, packs_per_step: int) -> StepPacks:
        """The next packs of the row, as many in each step."""


class StepSampler:
    """The steps of a training run for one of `num_ranks` data-parallel ranks.

    An epoch takes every pack once; its last step may have fewer micro-batches, but as many on each rank. `max_steps`,
    if given, takes the place of `num_epochs`: the run goes on through as many epochs as that takes. The steps of a
    streamed dataset all have as many packs, which may be of two epochs.
    Raises UserError for counts below 1, and for a streamed dataset without `max_steps`.
    """

    def __init__(
        self,
        dataset: Packed | Streamed,
        *,
        num_accumulation_steps: int,
        num_epochs: int = 1,
        max_steps: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        counts = {"num_accumulation_steps": num_accumulation_steps, "num_epochs": num_epochs, "max_steps": max_steps}
        wrong = [f"{name}={count}" for name, count in counts.items() if count is not None and count < 1]
        if wrong:
            raise UserError(f"{', '.join(wrong)}: expected at least 1.")
        assert 0 <= rank < num_ranks, (rank, num_ranks)
        self._dataset = dataset
        self.packs_per_step = num_accumulation_steps * num_ranks
        self._rank, self._num_ranks = rank, num_ranks
        if isinstance(dataset, Streamed):
            if max_steps is None:
                raise UserError(ENDLESS)
            self._num_steps = max_steps
        else:
            self.steps_per_epoch = -(-dataset.num_packs // self.packs_per_step)
            self._num_steps = max_steps if max_steps is not None else num_epochs * self.steps_per_epoch
        self._start = 0

    def __len__(self) -> int:
        """Steps of the whole run, wherever it starts."""
        return self._num_steps

    def __iter__(self) -> Iterator[StepPlan]:
        return map(self.plan, range(self._start, self._num_steps))

    def seek(self, step: int) -> None:
        """Start from this step (counted from 0) the next time the steps are iterated."""
        if not 0 <= step <= self._num_steps:
            raise UserError(f"Step {step} is not in a run of {self._num_steps} steps. Check max_steps, num_epochs.")
        self._start = step

    def plan(self, step: int) -> StepPlan:
        """What this rank does in a step: every `num_ranks`-th pack of the step's, in constant time within an epoch."""
        taken = self.of_all_ranks(step)
        num_micro_batches = -(-len(taken.packs) // self._num_ranks)
        mine = [tuple(pack.tolist()) for pack in taken.packs[self._rank :: self._num_ranks]]
        mine += [()] * (num_micro_batches - len(mine))
        return StepPlan(step, taken.epoch, tuple(mine), taken.num_loss_tokens)

    def of_all_ranks(self, step: int) -> StepPacks:
        """What all ranks together take in a step; it depends on `packs_per_step`, not on how many ranks share them."""
        if isinstance(self._dataset, Streamed):
            return self._dataset.step_packs(step, self.packs_per_step)
        return self._of_epoch(self._dataset, step)

    def _of_epoch(self, dataset: Packed, step: int) -> StepPacks:
        epoch, place = divmod(step, self.steps_per_epoch)
        packs = dataset.packs(epoch)
        first = place * self.packs_per_step
        last = min(first + self.packs_per_step, len(packs))
        documents = packs.documents[packs.edges[first] : packs.edges[last]]
        num_loss_tokens = dataset.num_loss_tokens[documents].sum().item()
        return StepPacks(epoch, [packs[number] for number in range(first, last)], num_loss_tokens)
