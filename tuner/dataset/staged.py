"""One run through stages, each a packed dataset of its own: which packs a step has, as a function of the step."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tuner.dataset.collate import Batch, collate_packs
from tuner.dataset.format_choice import Format
from tuner.dataset.ledger import Ledger
from tuner.dataset.packed import PackedDataset
from tuner.dataset.packing import IntArray
from tuner.dataset.prepare import build_shards
from tuner.dataset.rendering import Rendering
from tuner.dataset.sampler import StepPacks, StepPlan
from tuner.dataset.shards import Shards
from tuner.dataset.sources import DataPath
from tuner.dataset.stages import Span, Stage, check_run, read_stages, spans
from tuner.errors import UserError

NEED_MAX_STEPS = "stages share out the steps of a run, so max_steps must say how many it has; num_epochs does not."


@dataclass(frozen=True, kw_only=True)
class StageShards:
    """The arguments of `build_shards`, of which each stage makes its own shards, from its own files if it has some."""

    path: DataPath
    data_format: str | Format
    chat_template: str | Rendering
    tokenizer: Any
    max_length: int
    too_long: str = "truncate"
    on_bad_row: str = "raise"
    cache_dir: str | Path | None = None

    def of(self, stage: Stage) -> Shards:
        """What a stage trains. Raises UserError as `build_shards` does."""
        path = self.path if stage.data_path is None else stage.data_path
        settings = {**vars(self), "path": path, "max_length": stage.max_length}
        return build_shards(**settings)


@dataclass(frozen=True, kw_only=True)
class StageDatasets:
    """What the datasets of all stages have in common; `build_dataloader` makes the `StagedDataset` of it.

    Args:
        shards: what is read, and how.
        max_length: of the longest stage.
        seed: of the order of the data.
        pack: whether documents share packs.
        pad_to_multiple_of: tokens of a batch.
    """

    shards: StageShards
    max_length: int
    seed: int
    pack: bool = True
    pad_to_multiple_of: int = 1

    def staged(
        self, stages: Sequence[Mapping[str, Any]], num_steps: int | None, packs_per_step: int
    ) -> "StagedDataset":
        """The data of a run of `num_steps`; `packs_per_step` of the longest stage are the tokens of a step.

        Raises:
            UserError: stages that are none; a stage whose source is too short for its share, if that is to stop all.
        """
        read = read_stages(stages)
        if num_steps is None:
            raise UserError(NEED_MAX_STEPS)
        check_run(read, num_steps, self.max_length)
        make = partial(PackedDataset, pack=self.pack, pad_to_multiple_of=self.pad_to_multiple_of)
        tokens_per_step = packs_per_step * self.max_length
        full = spans(read, num_steps, tokens_per_step)  # tells of mistakes before anything is tokenised
        parts = []
        for place, (stage, span) in enumerate(zip(read, full)):
            print(f"stage {place + 1} of {len(read)}, {stage.max_length:,} tokens", flush=True)
            seed = self.seed + (place << 32)  # another order in each; the first has that of a run without stages
            own = partial(make, max_length=stage.max_length, seed=seed, buckets=stage.buckets)
            parts.append(own(self.shards.of(stage), num_wanted=span.num_steps * span.packs_per_step))
        borders = spans(read, num_steps, tokens_per_step, [part.fill for part in parts])
        for place, (stage, span, part) in enumerate(zip(read, borders, parts)):
            print(f"stage {place + 1} of {len(read)}: {describe(stage, span)}", flush=True)
            check_sources(place, stage, part, span)
        return StagedDataset(read, borders, parts)


class StagedDataset:
    """The packs of a run through its stages; documents are numbered through all of them. A `Streamed` for the sampler.

    A stage goes through its own data from the beginning, and again where it has more steps than that fills.
    """

    def __init__(self, stages: Sequence[Stage], borders: Sequence[Span], parts: Sequence[PackedDataset]) -> None:
        self.stages, self.spans, self.parts = list(stages), list(borders), list(parts)
        self.max_length = max(stage.max_length for stage in stages)
        self.pack, self.pad_to_multiple_of = parts[0].pack, parts[0].pad_to_multiple_of
        shards = [part.shards for part in parts]
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        directories = [directory for own in shards for directory in own.directories]
        self.shards = Shards(directories, [source for own in shards for source in own.sources])

    def place(self, step: int) -> int:
        """The number of the stage that a step, counted from 0, belongs to; both count from 0."""
        step = min(step, self.spans[-1].end - 1)
        return bisect_right([span.first for span in self.spans], step) - 1

    def step_packs(self, step: int, packs_per_step: int) -> StepPacks:
        """What all ranks together take in a step: as many packs as its stage says, whatever `packs_per_step` is."""
        place = self.place(step)
        span, part = self.spans[place], self.parts[place]
        first = (step - span.first) * span.packs_per_step
        numbers = [divmod(number, part.num_packs) for number in range(first, first + span.packs_per_step)]
        packs = [part.packs(epoch)[number] for epoch, number in numbers]
        num_loss_tokens = sum(part.num_loss_tokens[documents].sum().item() for documents in packs)
        return StepPacks(numbers[0][0], [self._starts[place] + documents for documents in packs], num_loss_tokens)

    def __getitem__(self, plan: StepPlan) -> list[Batch]:
        """One batch per micro-batch of the plan."""
        return collate_packs(plan.packs, self.shards.document, plan.num_loss_tokens, self.pad_to_multiple_of)

    def document_ids(self, plan: StepPlan) -> list[str]:
        """The `file:line` of every document of a step, to find what went wrong in it."""
        return [self.shards.source(index) for documents in plan.packs for index in documents]

    def fingerprint(self, packs: Sequence[Sequence[int] | IntArray]) -> str:
        """Hash over all documents of all stages, and the steps that each has."""
        return hashlib.sha256(json.dumps([self.shards.fingerprint, self.spans]).encode()).hexdigest()

    def tell_idle(self, num_ranks: int) -> None:
        """Say which stages leave ranks without a pack in some micro-batch, and the remedy; gradients stay right."""
        for place, (stage, span) in enumerate(zip(self.stages, self.spans)):
            number = span.packs_per_step
            if idle := -number % num_ranks:
                print(
                    f"  stages[{place}]: {number:,} packs a step do not divide by {num_ranks:,} data-parallel ranks: "
                    f"{idle:,} of {number + idle:,} micro-batches are empty. Its tokens_per_step = "
                    f"{(number + idle) * stage.max_length} would fill them.",
                    flush=True,
                )

    @property
    def sizes(self) -> tuple[IntArray, IntArray]:
        """(documents,) tokens and labels of each document of the first pass of each stage."""
        found = [part.sizes for part in self.parts]
        return np.concatenate([tokens for tokens, _ in found]), np.concatenate([labels for _, labels in found])

    @property
    def ledger(self) -> Ledger:
        """Where the tokens of all stages went that were read; a file that two stages have is counted in both."""
        return sum((part.shards.ledger for part in self.parts), Ledger())

    @property
    def contributions(self) -> list[dict[str, Any]]:
        """What each source of each stage has, as `contributions.contributions` gives it of a pass of its stage."""
        return [{"stage": place, **row} for place, part in enumerate(self.parts) for row in part.contributions]

    def achieved(self) -> list[dict[str, Any]]:
        """Of each stage: its steps, tokens and their share beside the one asked for, by source and bucket too."""
        drawn = [self._drawn(place) for place in range(len(self.stages))]
        total = sum(int(tokens.sum()) for tokens in drawn)
        rows = []
        for stage, span, part, tokens in zip(self.stages, self.spans, self.parts, drawn):
            parts = [
                {"name": name, "asked": weight, "share": float(own / tokens.sum()), "passes": float(own / has)}
                for name, weight, own, has in zip(part.group_names, part.group_shares, tokens, part.group_tokens)
            ]
            rows.append({
                "max_length": stage.max_length, "first_step": span.first, "steps": span.num_steps,
                "packs_per_step": span.packs_per_step, "tokens": int(tokens.sum()), "asked": stage.share,
                "share": int(tokens.sum()) / total, "parts": parts,
            })  # fmt: skip
        return rows

    def _drawn(self, place: int) -> IntArray:
        """(groups,) tokens that a stage takes of each of its groups in all of its steps."""
        part, span = self.parts[place], self.spans[place]
        epochs, rest = divmod(span.num_steps * span.packs_per_step, part.num_packs)
        tokens = np.zeros(len(part.group_names), np.int64)
        for epoch in range(epochs + (rest > 0)):
            packs = part.packs(epoch)
            documents = packs.documents[: packs.edges[rest if epoch == epochs else -1]]
            np.add.at(tokens, part.groups_of(documents), part.shards.lengths[documents])
        return tokens


def describe(stage: Stage, span: Span) -> str:
    """For a person."""
    steps = f"steps {span.first + 1:,} to {span.end:,} of {span.packs_per_step:,} packs of {stage.max_length:,} tokens"
    rate = f", lr x {stage.lr_factor:g}" if stage.lr_factor != 1 else ""
    return f"{steps}, {stage.share:.4g} of all{rate}"


def check_sources(place: int, stage: Stage, part: PackedDataset, span: Span) -> None:
    """Say which sources have fewer tokens than their share; raise UserError where that is to stop the run."""
    tokens = span.num_steps * span.packs_per_step * stage.max_length * part.fill
    short = []
    for name, share, has in zip(part.group_names, part.group_shares, part.group_tokens):
        taken = tokens * share
        if taken > has:
            short.append(f"of {name} there are {has:,} tokens, its share takes {taken:,.0f} ({taken / has:.3g} times)")
    if short and stage.short_source == "stop":
        raise UserError(
            f"stages[{place}]: {'; '.join(short)}. Lower max_steps or its share, add data, or set short_source = "
            '"repeat" to go through it again.'
        )
    for text in short:
        print(f"  {text}: it is repeated", flush=True)
