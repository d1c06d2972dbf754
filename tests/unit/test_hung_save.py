"""A disk that hangs while a checkpoint is written is seen beside training and at the end of a run, and said by whom."""

import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
from stub_training import make_runner

from tuner.engine import hung_save, pending_save
from tuner.engine.checkpoint import list_checkpoints
from tuner.engine.draft import note_name
from tuner.engine.frame import Hook
from tuner.engine.hooks import CheckpointHook
from tuner.engine.pending_save import PendingSave
from tuner.engine.progress import Progress
from tuner.engine.world import World

TIMEOUT = 0.2  # seconds


class Disk:
    """It hangs at one fsync of a save's thread, until somebody is told of it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, step: int) -> None:
        self.said: list[str] = []
        self.hung, self.released = threading.Event(), threading.Event()
        self.step, self._fsync = step, os.fsync
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(hung_save, "end", self.end)

    def fsync(self, file: int) -> None:
        if threading.current_thread().name == f"save-{self.step}" and not self.hung.is_set():
            self.hung.set()
            while not self.released.is_set():
                time.sleep(0.01)
        self._fsync(file)

    def end(self, error: Exception) -> None:
        if not self.released.is_set():
            self.said.append(str(error))
        self.released.set()


class SlowSteps(Hook):
    """Training goes on beside the writer, and is seen to."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.steps_beside = disk, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.disk.hung.is_set() and not self.disk.released.is_set():
            self.steps_beside.append(batch_idx + 1)
        if batch_idx + 1 == 3:
            assert self.disk.released.wait(60), "nobody was told before the next save"


@pytest.mark.parametrize(("step", "training"), [(2, "in step 3"), (6, "in step 6 (checkpoint)")])
def test_a_disk_that_hangs_is_told_beside_training_and_at_the_end_of_a_run(tmp_path, monkeypatch, step, training):
    disk = Disk(monkeypatch, step=step)
    beside = SlowSteps(disk)
    hooks = [CheckpointHook(interval=step, async_save=True), *([beside] if step == 2 else [])]
    make_runner(tmp_path, hooks=hooks, loop={"rank_timeout": TIMEOUT}).train()
    [said] = disk.said
    assert re.match(rf"Rank 0 hangs in saving step {step}: its writer writes its files for \d+ s, at ", said)
    assert "(fsync).\n" in said, "where the thread is"
    assert f"Training was {training}" in said
    assert step == 6 or beside.steps_beside == [3]
    assert list_checkpoints(tmp_path)[-1].name == "step_00000006", "a disk that goes on is no harm"


def test_a_rank_that_waits_for_anothers_files_names_it(tmp_path, monkeypatch):
    said = threading.Event()
    told: list[str] = []
    monkeypatch.setattr(hung_save, "end", lambda error: (told.append(str(error)), said.set()))
    monkeypatch.setattr(pending_save, "gather_objects", lambda value, world: [value] * world.size)
    monkeypatch.setattr(pending_save, "write_snapshot", lambda *_: {})
    monkeypatch.setattr("tuner.engine.together.gather_objects", lambda value, world: [value] * world.size)
    snapshot = SimpleNamespace(step=4, num_bytes=0, facts={})
    pending = PendingSave(snapshot, tmp_path, World(0, 2), published=lambda _: None)
    hung_save.watch_save(pending, World(0, 2), Progress(), timeout=TIMEOUT)
    assert said.wait(60)
    assert told[0].startswith("Rank 0 hangs in saving step 4: its writer waits for the files of rank 1 for ")
    (tmp_path / "checkpoints" / ".draft_step_00000004" / note_name(1)).write_text('{"files": {}}')
    pending.leave()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004"]


def test_a_large_checkpoint_on_a_slow_disk_has_its_time():
    assert hung_save.seconds_for(0, 10.0) < 25.0
    assert hung_save.seconds_for(84 * 10**9, 1800.0) > 2 * 1800.0 + 84 * 10**9 / 20e6


def test_a_job_that_was_suspended_has_its_time_anew(monkeypatch):
    """Time that passes while nothing runs does not count: a tick is counted, however long it was."""
    ticks = []
    monkeypatch.setattr(hung_save, "end", lambda error: pytest.fail(str(error)))
    pending = SimpleNamespace(
        num_bytes=0, part="writes its files", wait=lambda seconds: ticks.append(time.sleep(0.2)) or len(ticks) > 4
    )
    hung_save._judge(pending, World(0, 1), Progress(), TIMEOUT)  # 1 s by the clock, limit 0.9 s
    assert len(ticks) == 5
