"""A run in stages that is killed at any step, around their borders too, ends as the one that never was, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest
from test_kills import assert_whole, reference
from trials import Trials, write_source

from tuner.engine.checkpoint import checkpoint_path
from tuner.engine.tensor_files import WEIGHTS, TensorFiles
from tuner.prove.resume import differences, is_same, read_metrics

NUM_STEPS, BORDERS = 12, (5, 9)  # steps after which a stage begins
STAGES: list[dict[str, Any]] = [
    {"max_length": 64, "share": 5 / 12},
    {"max_length": 256, "share": 4 / 12, "buckets": {64: 0.5, 256: 0.5}, "rope_theta": 1e6, "lr_factor": 0.5},
    {"max_length": 256, "share": 3 / 12, "rope_scaling": {"rope_type": "linear", "factor": 2}},
]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run through three stages: its config, and where it ended."""
    folder = tmp_path_factory.mktemp("staged")
    settings = {"max_steps": NUM_STEPS, "save_interval": 2, "keep_checkpoints": None}
    source = write_source(folder, stages=STAGES, **settings)
    return source, reference(folder, source)


@pytest.mark.faults
def test_the_stages_differ_and_begin_where_they_should(staged: tuple[str, Path]) -> None:
    rows = read_metrics(staged[1])
    assert [rows[step]["stage"] for step in sorted(rows)] == [1] * 5 + [2] * 4 + [3] * 3
    early, late = (TensorFiles(checkpoint_path(staged[1], step), WEIGHTS) for step in (2, NUM_STEPS))
    assert not all(is_same(early[name], late[name]) for name in early), "it learns"


@pytest.mark.faults
@pytest.mark.parametrize("border", [*BORDERS, None])
def test_whenever_it_is_killed_it_goes_on_bit_for_bit(
    staged: tuple[str, Path], tmp_path: Path, border: int | None
) -> None:
    source, expected = staged
    moments = random.Random(border)
    steps = range(1, NUM_STEPS) if border is None else range(border - 1, border + 2)
    num_kills = 0
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials = Trials(folder, source)
        for step in sorted(moments.sample(steps, 2)):
            before = trials.newest()
            trials.start()
            num_kills += trials.kill_after(moments.uniform(0, 0.05), inside=moments.random() < 0.3, step=step)
            assert_whole(trials, before)
        trials.finish()
        assert differences(expected, trials.work_dir, NUM_STEPS) == []
        stages = {step: row["stage"] for step, row in read_metrics(trials.work_dir).items()}
        assert stages == {step: row["stage"] for step, row in read_metrics(expected).items()}
    assert num_kills >= 8, "of ten; the others had ended before"
