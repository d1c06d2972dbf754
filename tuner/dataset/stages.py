"""Stages of a run as a config writes them: lengths, shares of the tokens, sources, rotary settings, learning rates."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from tuner.dataset.sources import DataPath, as_entries
from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

SUM_ERROR = 1e-6  # that shares may be off 1 by rounding
SHORT_SOURCE = ("repeat", "stop")


class Stage(NamedTuple):
    """A stage as a config writes it, with what it leaves out filled in."""

    max_length: int  # of its packs, in tokens
    share: float  # of all tokens of the run
    data_path: DataPath | None = None  # None: the recipe's
    buckets: Mapping[int, float] | None = None  # most tokens of a document -> share of the stage's tokens
    tokens_per_step: int | None = None  # None: as many as num_accumulation_steps packs of the recipe's max_length
    short_source: str = "repeat"  # what happens to one with fewer tokens than its share: "repeat", or "stop" before all
    lr_factor: float = 1.0  # of what the schedule says
    rope_theta: float | None = None  # None: the recipe's
    rope_scaling: Mapping[str, Any] | None = None  # None: the recipe's


class Span(NamedTuple):
    """Which steps of a run a stage has, and how many packs are in each."""

    first: int  # counted from 0
    num_steps: int
    packs_per_step: int

    @property
    def end(self) -> int:
        """The step behind its last."""
        return self.first + self.num_steps


def read_stages(stages: object) -> list[Stage]:
    """The stages of a config.

    Raises:
        UserError: that says of every stage what is wrong; shares that do not add up.
    """
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages) or not stages:
        raise UserError(f"stages = {stages!r}: allowed is None, or a list of dicts with max_length and share.")
    problems = [f"stages[{place}]: {text}" for place, stage in enumerate(stages) for text in wrong_stage(stage)]
    if problems:
        raise UserError("\n".join(problems))
    total = sum(stage["share"] for stage in stages)
    if abs(total - 1) > SUM_ERROR:
        shares = " + ".join(f"{stage['share']:g}" for stage in stages)
        raise UserError(f"The shares of the stages are {shares} = {total:g} of the tokens. They must add up to 1.")
    read = []
    for stage in stages:
        buckets = stage.get("buckets")
        whole = None if buckets is None else {int(most): float(share) for most, share in sorted(buckets.items())}
        read.append(Stage(**{**stage, "buckets": whole}))
    return read


def without_paths(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages as a config writes them but for where their files lie, which their content has to make up for."""
    return [
        {**stage, "data_path": [_without_path(entry) for entry in as_entries(stage["data_path"])]}
        if stage.get("data_path") is not None
        else dict(stage)
        for stage in stages
    ]


def _without_path(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    return {} if isinstance(entry, str) else {key: value for key, value in entry.items() if key != "path"}


def wrong_stage(stage: Mapping[str, Any]) -> list[str]:
    """What of a stage is none of what is allowed."""
    unknown = [name for name in stage if name not in Stage._fields]
    problems = [f"unknown key {name!r}.{did_you_mean_or_all(name, Stage._fields)}" for name in unknown]
    problems += [f"{name} is missing." for name in ("max_length", "share") if name not in stage]
    for name, low in (("max_length", 2), ("tokens_per_step", 1)):
        value = stage.get(name)
        if name in stage and not (type(value) is int and value >= low):
            problems.append(f"{name} = {value!r}: allowed is a whole number of tokens from {low}.")
    for name in ("share", "lr_factor"):
        if name in stage and not is_positive(stage[name]):
            problems.append(f"{name} = {stage[name]!r}: allowed is a finite number above 0.")
    if stage.get("short_source", SHORT_SOURCE[0]) not in SHORT_SOURCE:
        problems.append(f"short_source = {stage['short_source']!r}: allowed is {' or '.join(SHORT_SOURCE)}.")
    return problems + wrong_buckets(stage.get("buckets"), stage.get("max_length"))


def wrong_buckets(buckets: object, max_length: object) -> list[str]:
    """What is wrong with the buckets of a stage."""
    if buckets is None:
        return []
    if not isinstance(buckets, Mapping) or not buckets or not all(map(is_positive, buckets.values())):
        return [f"buckets = {buckets!r}: allowed is {{most tokens of a document: share of the tokens, ...}}."]
    if not all(type(most) is int and most > 0 for most in buckets):
        return [f"buckets = {buckets!r}: its keys are whole numbers of tokens from 1."]
    problems = []
    if abs(sum(buckets.values()) - 1) > SUM_ERROR:
        problems.append(f"the shares of its buckets add up to {sum(buckets.values()):g}, not to 1.")
    if max(buckets) != max_length:
        problems.append(f"its last bucket ends at {max(buckets)}, not at max_length = {max_length}.")
    return problems


def check_run(stages: Sequence[Stage], num_steps: object, max_length: object) -> None:
    """Raise UserError where stages do not fit the other settings of a run, as far as shows before data is read."""
    longest = max(stage.max_length for stage in stages)
    if longest != max_length:
        raise UserError(f"max_length = {max_length}, but the longest stage has {longest}. Make them the same.")
    for place, stage in enumerate(stages):
        if stage.tokens_per_step is not None and stage.tokens_per_step < stage.max_length:
            raise small_step(place, stage, stage.tokens_per_step)
    if isinstance(num_steps, int) and 0 < num_steps < len(stages):
        raise UserError(f"max_steps = {num_steps}, but there are {len(stages)} stages: one has none. Raise max_steps.")


def small_step(place: int, stage: Stage, tokens_per_step: int) -> UserError:
    """What to say of a stage whose steps have no room for a pack."""
    return UserError(
        f"stages[{place}]: a step has {tokens_per_step:,} tokens, fewer than a pack of max_length = "
        f"{stage.max_length:,}. Raise tokens_per_step."
    )


def is_positive(value: object) -> bool:
    """A finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf


def spans(
    stages: Sequence[Stage], num_steps: int, tokens_per_step: int, fill: Sequence[float] | None = None
) -> list[Span]:
    """The steps of each stage: shares of tokens become steps by how many tokens a step has.

    Args:
        stages: of a run.
        num_steps: of the whole run.
        tokens_per_step: that there is room for in a step of stages that say no other.
        fill: the share of its packs' room that each stage's documents fill; None takes them as full.

    Raises:
        UserError: too few steps for every stage to have one, or too few tokens in a step for a pack.
    """
    packs = [(stage.tokens_per_step or tokens_per_step) // stage.max_length for stage in stages]
    small = [place for place, number in enumerate(packs) if number < 1]
    if small:
        stage = stages[small[0]]
        raise small_step(small[0], stage, stage.tokens_per_step or tokens_per_step)
    full = fill or [1.0] * len(stages)
    asked = [stage.share / (number * stage.max_length * part) for stage, number, part in zip(stages, packs, full)]
    exact = [num_steps * part / sum(asked) for part in asked]
    ends = [round(end) for end in accumulate(exact)]
    found = [Span(first, end - first, number) for first, end, number in zip([0, *ends], ends, packs)]
    if any(span.num_steps < 1 for span in found):
        needed = " + ".join(f"{part:.2g}" for part in exact)
        raise UserError(f"max_steps = {num_steps} is {needed} steps for the stages: one has none. Raise max_steps.")
    return found
