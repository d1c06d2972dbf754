"""Stages and buckets over documents that are only lengths: shares of tokens, borders, any step without the others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.dataset.ledger import Ledger
from tuner.dataset.mixture import Share
from tuner.dataset.packed import PackedDataset
from tuner.dataset.sampler import StepSampler
from tuner.dataset.staged import StagedDataset
from tuner.dataset.stages import Stage, read_stages, spans
from tuner.engine.schedule import WarmupCosine
from tuner.engine.stages import StagedSchedule
from tuner.errors import UserError


class Lengths:
    """What a dataset asks of shards."""

    def __init__(self, parts: list[np.ndarray], weights: list[float] | None = None) -> None:
        self.lengths = np.concatenate(parts)
        self.num_loss_tokens, self.loss_weight = self.lengths - 1, None
        self.starts = np.cumsum([0, *map(len, parts)])
        self.sources = [Path(f"{place}.jsonl") for place in range(len(parts))]
        self.shares = [Share(f"{place}.jsonl", weight, 1) for place, weight in enumerate(weights or [])]
        self.directories: list[Path] = []
        self.ledger = Ledger()

    def __len__(self) -> int:
        return len(self.lengths)


RNG = np.random.default_rng(0)
WEB = RNG.lognormal(5, 0.8, 8000).clip(10, 1024).astype(np.int64)
BOOKS = RNG.integers(600, 4097, 900)


def staged(num_steps: int = 200) -> StagedDataset:
    """InternLM2's three stages in small: 512 tokens; 4,096, of which half come from documents to 512; and the rest."""
    stages = [
        Stage(512, 0.9),
        Stage(4096, 0.09, buckets={512: 0.5, 4096: 0.5}),
        Stage(4096, 0.01, lr_factor=0.1),
    ]
    parts: list[Any] = [
        PackedDataset(Lengths([WEB.clip(0, 512)]), max_length=512, seed=0),  # type: ignore[arg-type]
        PackedDataset(Lengths([WEB, BOOKS], [1, 1]), max_length=4096, seed=0, buckets=stages[1].buckets),  # type: ignore[arg-type]
        PackedDataset(Lengths([BOOKS]), max_length=4096, seed=0),  # type: ignore[arg-type]
    ]
    made = StagedDataset.__new__(StagedDataset)
    made.stages, made.parts, made.max_length = stages, parts, 4096
    made.spans = spans(stages, num_steps, 8 * 4096, [part.fill for part in parts])
    made._starts = np.cumsum([0, *(len(part.shards) for part in parts)]).tolist()
    return made


def test_shares_of_the_tokens_are_those_that_were_asked_for() -> None:
    made = staged(1000)
    assert [span.packs_per_step for span in made.spans] == [64, 8, 8]
    assert made.spans[-1].end == 1000
    lengths = np.concatenate([part.shards.lengths for part in made.parts])
    tokens = np.zeros(3)
    for step in range(1000):
        tokens[made.place(step)] += sum(lengths[pack].sum() for pack in made.step_packs(step, 0).packs)
    assert tokens / tokens.sum() == pytest.approx([0.9, 0.09, 0.01], abs=0.003)
    told = made.achieved()
    assert [row["tokens"] for row in told] == tokens.tolist()
    names = {part["name"]: part for part in told[1]["parts"]}
    below = [part for name, part in names.items() if name.endswith("to 512")]
    assert [part["asked"] for part in below] == [0.5], "only one source has such"
    assert below[0]["share"] == pytest.approx(0.5, abs=0.01)
    assert names["0.jsonl to 4,096"]["share"] == pytest.approx(0.25, abs=0.01)
    assert names["1.jsonl to 4,096"]["share"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("num_packs", [16, 100, 900])
def test_a_short_stage_has_its_shares_too_within_two_packs(num_packs: int) -> None:
    shards: Any = Lengths([WEB, BOOKS], [3, 7])
    part = PackedDataset(shards, max_length=4096, seed=0, buckets={512: 0.4, 4096: 0.6}, num_wanted=num_packs)
    packs = part.packs(0)
    assert len(packs) > num_packs
    drawn = packs.documents[: packs.edges[num_packs]]
    tokens = np.bincount(part.groups_of(drawn), weights=shards.lengths[drawn], minlength=len(part.group_names))
    missed = tokens - np.array(part.group_shares) * tokens.sum()
    assert abs(missed).max() < 2 * 4096


def test_any_step_is_known_without_those_before_it_and_ranks_share_it() -> None:
    made = staged()
    walked = list(StepSampler(made, num_accumulation_steps=8, max_steps=200))
    borders = [span.first for span in made.spans]
    assert len(set(borders)) == 3
    fresh = staged()
    alone = StepSampler(fresh, num_accumulation_steps=8, max_steps=200)
    for step in (199, *(at + by for at in borders[:0:-1] for by in (1, 0, -1)), 0):
        assert alone.plan(step) == walked[step]
    ranks = [StepSampler(fresh, num_accumulation_steps=2, max_steps=200, rank=r, num_ranks=4) for r in range(4)]
    for step in (0, borders[1], borders[2]):
        plans = [rank.plan(step) for rank in ranks]
        assert len({plan.num_loss_tokens for plan in plans}) == 1
        assert sorted(pack for plan in plans for pack in plan.packs) == sorted(walked[step].packs)


def test_ranks_that_a_stage_leaves_without_a_pack_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    made = staged()
    capsys.readouterr()
    made.tell_idle(8)
    assert not capsys.readouterr().out
    made.tell_idle(3)
    told = capsys.readouterr().out.splitlines()
    ranks = [StepSampler(made, num_accumulation_steps=1, max_steps=200, rank=rank, num_ranks=3) for rank in range(3)]
    for place, (line, span) in enumerate(zip(told, made.spans, strict=True)):
        batches = [pack for rank in ranks for pack in rank.plan(span.first).packs]
        empty = batches.count(())
        assert f"stages[{place}]: {len(batches) - empty} packs a step" in line
        assert f" {empty} of {len(batches)} micro-batches are empty" in line
        assert f"tokens_per_step = {len(batches) * made.stages[place].max_length} " in line


def test_four_million_tokens_a_step_are_as_many_whatever_the_length() -> None:
    """README's curriculum on 32 ranks of 4 packs: 90, 9 and 1 % of 10,000 steps."""
    shares = {0.9: 4096, 0.09: 32768, 0.01: 32768}
    read = read_stages([{"max_length": length, "share": share} for share, length in shares.items()])
    planned = spans(read, 10_000, 32 * 4 * 32768)
    assert planned == [(0, 9000, 1024), (9000, 900, 128), (9900, 100, 128)]
    assert {span.packs_per_step * stage.max_length for span, stage in zip(planned, read)} == {1 << 22}


def test_a_stage_takes_each_document_once_before_any_comes_again() -> None:
    made = staged()
    span = made.spans[0]
    seen = [pack for step in range(span.num_steps) for pack in made.step_packs(step, 0).packs]
    counts = np.bincount(np.concatenate(seen))
    epochs = span.num_steps * span.packs_per_step / made.parts[0].num_packs
    assert counts.max() <= np.ceil(epochs)


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(100, 5000))
def test_spans_fill_the_run_and_are_within_a_step_of_their_shares(parts: list[float], num_steps: int) -> None:
    stages = [Stage(2 ** (9 + place), part / sum(parts)) for place, part in enumerate(parts)]
    found = spans(stages, num_steps, 1 << 14)
    assert [span.first for span in found] == [0, *(span.end for span in found[:-1])]
    assert found[-1].end == num_steps
    for stage, span in zip(stages, found):
        assert span.packs_per_step * stage.max_length == 1 << 14
        assert abs(span.num_steps - stage.share * num_steps) <= 1


def test_a_batch_of_its_own_in_tokens_makes_fewer_steps_of_the_same_share() -> None:
    stages = [Stage(512, 0.5, tokens_per_step=1 << 14), Stage(512, 0.5, tokens_per_step=1 << 12)]
    assert [(span.num_steps, span.packs_per_step) for span in spans(stages, 100, 0)] == [(20, 32), (80, 8)]


def test_a_stage_scales_the_learning_rate() -> None:
    made, plain = staged(), WarmupCosine(warmup_ratio=0.1, min_lr_ratio=0.1)
    schedule = StagedSchedule(plain, made)
    border = made.spans[2].first
    assert schedule.factor(border - 1, 200) == plain.factor(border - 1, 200)
    assert schedule.factor(border, 200) == 0.1 * plain.factor(border, 200)


def test_all_mistakes_of_stages_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        read_stages([{"max_length": 1, "share": 0}, {"share": 1, "lr": 3, "buckets": {9: 1}}])
    text = str(caught.value)
    for words in ("stages[0]: max_length = 1", "stages[0]: share = 0", "stages[1]: max_length is missing", "key 'lr'"):
        assert words in text


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -0.5, True, "1"])
@pytest.mark.parametrize("key", ["share", "lr_factor", "buckets"])
def test_a_share_or_a_factor_is_a_finite_number_above_0(key: str, number: object) -> None:
    value = {8: number} if key == "buckets" else number
    with pytest.raises(UserError, match=rf"stages\[0\]: {key} = "):
        read_stages([{"max_length": 8, "share": 1, key: value}])


def test_a_bucket_without_documents_is_refused() -> None:
    shards: Any = Lengths([BOOKS])
    with pytest.raises(UserError, match="No document has 1 to 512 tokens"):
        PackedDataset(shards, max_length=4096, seed=0, buckets={512: 0.5, 4096: 0.5})


def test_what_no_list_of_stages_is_is_refused() -> None:
    for wrong in ("4k", [], [4096], SimpleNamespace()):
        with pytest.raises(UserError, match="allowed is None, or a list of dicts"):
            read_stages(wrong)
