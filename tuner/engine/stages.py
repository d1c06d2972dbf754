"""What changes where a run comes to another stage: rotary settings, the learning rate, and what is said of its data."""

from typing import Any

from transformers import PreTrainedModel

from tuner.dataset.staged import StagedDataset, describe
from tuner.dataset.stages import Stage
from tuner.engine.schedule import WarmupCosine
from tuner.model.rope import Rope, own_rope, replace_rope, set_rope


def stage_rope(rope: Rope, stage: Stage) -> Rope:
    """The rotary settings of a stage: its own where it has some, the run's elsewhere."""
    theta = rope.theta if stage.rope_theta is None else stage.rope_theta
    scaling = rope.scaling if stage.rope_scaling is None else stage.rope_scaling
    return Rope(theta, scaling, stage.max_length)


class StagedRope:
    """The rotary settings of a model, by the step; each rank sets its own, before the step.

    Args:
        llm: as it was built.
        rope: of the whole run, where a stage says nothing else.
        dataset: of the run; one without stages has the same settings from the first step to the last.
    """

    def __init__(self, llm: PreTrainedModel, rope: Rope, dataset: Any) -> None:
        self._llm, self._rope = llm, rope
        self._dataset = dataset if isinstance(dataset, StagedDataset) else None
        ropes = [self._of(place) for place in range(len(self._dataset.stages))] if self._dataset else [rope]
        self._own = None if all(each.is_own for each in ropes) else own_rope(llm.config)
        self._current: Rope | None = None

    def enter(self, step: int) -> bool:
        """Be as the stage of a step (counted from 0) says; returns whether something changed."""
        rope = self._rope if self._dataset is None else self._of(self._dataset.place(step))
        if self._own is None or rope == self._current:
            return False
        set_rope(self._llm, self._own, rope)
        self._current = rope
        return True

    def _of(self, place: int) -> Rope:
        assert self._dataset is not None
        return stage_rope(self._rope, self._dataset.stages[place])

    def base(self) -> float | None:
        """The base in use; None where the run leaves all to the model."""
        if self._own is None or self._current is None:
            return None
        return float(replace_rope(self._own, self._current).parameters["rope_theta"])


class StagedSchedule(WarmupCosine):
    """Another schedule, times the factor of the stage that a step belongs to."""

    def __init__(self, schedule: WarmupCosine, dataset: StagedDataset) -> None:
        super().__init__(warmup_ratio=schedule.warmup_ratio, min_lr_ratio=schedule.min_lr_ratio)
        self._schedule, self._dataset = schedule, dataset

    def factor(self, step: int, num_steps: int) -> float:
        """Share of the peak learning rate at `step`, counted from 0."""
        return self._schedule.factor(step, num_steps) * self._dataset.stages[self._dataset.place(step)].lr_factor


def border(dataset: Any, step: int, base: float | None) -> str | None:
    """What to say before a step (counted from 0) that begins a stage; None before any other."""
    if not isinstance(dataset, StagedDataset):
        return None
    place = dataset.place(step)
    if dataset.spans[place].first != step:
        return None
    turned = "" if base is None else f", rotary base {base:g}"
    what = describe(dataset.stages[place], dataset.spans[place])
    return f"stage {place + 1} of {len(dataset.stages)}: {what}{turned}"


def told_shares(dataset: StagedDataset) -> str:
    """For a person: each stage's share of the tokens, and its sources' and buckets', beside what was asked for."""
    lines = [f"{'share of tokens':<40}{'asked':>9}{'came':>9}{'passes':>9}"]
    for place, row in enumerate(dataset.achieved()):
        head = f"stage {place + 1}, {row['steps']:,} steps of {row['max_length']:,}"
        lines.append(f"{head:<40}{row['asked']:>9.2%}{row['share']:>9.2%}")
        lines += [
            f"  {part['name'][-37:]:<38}{part['asked']:>9.2%}{part['share']:>9.2%}{part['passes']:>9.2f}"
            for part in row["parts"]
        ]
    return "\n".join(lines)
