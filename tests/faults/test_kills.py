"""Runs that are killed at any moment have a whole checkpoint and end as the one that never was, bit for bit."""

import random
import shutil
import time
from pathlib import Path

import pytest
from trials import Fault, Trials, write_source

from tuner.engine.checkpoint import list_checkpoints, verify_checkpoint
from tuner.errors import UserError
from tuner.prove.resume import differences

NUM_STEPS = 30
POINTS = [
    ("tuner.engine.pending_save:begin_draft", False),
    ("tuner.engine.pending_save:begin_draft", True),
    ("tuner.engine.pending_save:write_snapshot", True),
    ("tuner.engine.pending_save:note_written", True),
    ("tuner.engine.pending_save:publish", False),
    ("tuner.engine.checkpoint:write_manifest", True),
    ("tuner.engine.checkpoint:rename_draft", True),
    ("tuner.engine.pending_save:publish", True),
    ("tuner.engine.saving:prune", False),
    ("tuner.engine.checkpoint:delete_checkpoint", False),
    ("tuner.engine.saving:prune", True),
]
QUICK = POINTS[2::3]


def reference(folder: Path, source: str, num_ranks: int = 1) -> Path:
    """The work dir of a run that nothing happened to."""
    whole = Trials(folder / "whole", source, num_ranks=num_ranks)
    (folder / "whole").mkdir()
    whole.finish()
    return whole.work_dir


def assert_whole(trials: Trials, at_least: int) -> None:
    """There is a checkpoint to go on from, and it is not older than one that was there before."""
    present = list_checkpoints(trials.work_dir)
    assert trials.newest() >= at_least
    for checkpoint in present:
        verify_checkpoint(checkpoint)


def kill_many(folder: Path, source: str, num_kills: int, *, num_ranks: int = 1, num_steps: int = NUM_STEPS) -> int:
    """Kill runs at random moments until there were so many kills; how many of them were inside a write."""
    expected = reference(folder, source, num_ranks)
    moments, done, inside, number = random.Random(num_kills), 0, 0, 0
    while done < num_kills:
        own = folder / f"killed_{number}"
        own.mkdir()
        trials, is_over = Trials(own, source, num_ranks=num_ranks), False
        while not is_over and done < num_kills:
            before = trials.newest()
            trials.start()
            step = before + moments.randint(0, 3)
            is_over = not trials.kill_after(moments.uniform(0, 0.1), inside=moments.random() < 0.5, step=step)
            done += not is_over
            assert_whole(trials, before)
        if not is_over:
            trials.finish()
        assert differences(expected, trials.work_dir, num_steps) == []
        inside, number = inside + trials.num_inside, number + 1
    return inside


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of four steps: its config, and where it ended."""
    folder = tmp_path_factory.mktemp("few")
    source = write_source(folder, max_steps=4)
    return source, reference(folder, source)


def die_at(few: tuple[str, Path], tmp_path: Path, point: str, behind: bool, **settings: int) -> None:
    source, expected = few
    for name, value in settings.items():
        source = source.replace(f"{name}: int | None = 1 ", f"{name}: int | None = {value} ")
    trials = Trials(tmp_path, source)
    trials.start(Fault(point, behind, call=2))
    assert trials.wait() == [-9]
    assert_whole(trials, 1)
    num_spare = int(trials.newest() == 4)  # who died with the last step saved saves no more, and deletes none
    trials.finish()
    assert differences(expected, trials.work_dir, 4) == []
    assert not trials.is_writing(), "drafts of the dead are removed"
    assert len(list_checkpoints(trials.work_dir)) <= settings.get("keep_checkpoints", 1) + num_spare


@pytest.mark.parametrize(("point", "behind"), QUICK)
def test_a_run_that_dies_at_a_point_of_a_save_goes_on(few, tmp_path, point, behind):
    die_at(few, tmp_path, point, behind)


@pytest.mark.faults
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("point", "behind"), POINTS)
def test_a_run_that_dies_at_any_point_of_a_save_goes_on_however_few_are_kept(few, tmp_path, point, behind, keep):
    die_at(few, tmp_path, point, behind, keep_checkpoints=keep)


@pytest.mark.faults
@pytest.mark.parametrize("async_save", [True, False])
def test_fifty_kills(tmp_path, async_save):
    source = write_source(tmp_path, async_save=async_save, max_steps=NUM_STEPS)
    assert kill_many(tmp_path, source, 25) >= 4


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_twenty_kills_of_two_ranks(tmp_path, stage):
    source = write_source(tmp_path, deepspeed=stage, max_steps=NUM_STEPS)
    kill_many(tmp_path, source, 20, num_ranks=2)


@pytest.mark.faults
@pytest.mark.parametrize("settings", [{"async_save": True}, {"async_save": True, "save_interval": 9}])
def test_a_disk_that_hangs_ends_a_run_that_is_alone_within_25_seconds(tmp_path, settings):
    """Where training waits at the next save, and at the end of the run for the last one."""
    step = 1 if "save_interval" not in settings else 4
    trials = Trials(tmp_path, write_source(tmp_path, max_steps=4, rank_timeout=10, **settings))
    trials.start(Fault("tuner.engine.snapshot:write_file", hangs=True))
    assert trials.wait() == [3]
    said = trials.log.read_text()
    assert time.time() - float(said.partition("hangs at ")[2].split()[0]) < 25
    assert f"Rank 0 hangs in saving step {step}: its writer writes its files for " in said
    assert "Traceback" not in said


@pytest.mark.faults
def test_twenty_times_a_file_that_cannot_grow(tmp_path):
    """Writes that fail in the middle cost a checkpoint and never a run, nor the checkpoint before."""
    source = write_source(tmp_path, max_steps=6)
    expected = reference(tmp_path, source)
    sizes = random.Random(0)
    largest = max(path.stat().st_size for path in expected.glob("checkpoints/*/*"))
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials = Trials(folder, source)
        trials.start(Fault(max_file_size=sizes.randint(40_000, largest - 1)))
        assert trials.wait() == [2], "the last checkpoint could not be written, which the user can mend"
        said = trials.log.read_text()
        assert said.count("Training goes on") == 5
        assert "Traceback" not in said
        assert "File too large" in said
        assert not list_checkpoints(trials.work_dir)
        trials.finish()
        assert differences(expected, trials.work_dir, 6) == []


@pytest.mark.parametrize("num_flips", [20, pytest.param(200, marks=pytest.mark.faults)])
def test_every_flipped_bit_is_found_before_anything_is_used(few, tmp_path: Path, num_flips: int):
    newest = list_checkpoints(few[1])[-1]
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    verify_checkpoint(copy)
    places, files = random.Random(num_flips), sorted(path for path in copy.rglob("*") if path.is_file())
    assert any(path.suffix == ".safetensors" for path in files)
    for number in range(num_flips):
        path = files[number % len(files)]
        data = path.read_bytes()
        place, bit = places.randrange(len(data)), places.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"damaged|format"):
            verify_checkpoint(copy)
        path.write_bytes(data)
    verify_checkpoint(copy)
