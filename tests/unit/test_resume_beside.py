"""On two ranks, all at once: saved beside training on slow disks, read by data workers, fp16 whose scale changes."""

import functools
import json
import multiprocessing
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_bad_steps import rows
from test_stop_ranks import MORE, QUICK, differing, runner_of, tensors, trace
from torch.utils.data import DataLoader

from tuner.dataset.group_signals import obey_parent_only
from tuner.engine import pending_save, zero_config
from tuner.engine.checkpoint import checkpoint_path
from tuner.engine.hooks import CheckpointHook, MetricsHook
from tuner.engine.runner import Runner

WAYS = QUICK | MORE
STRAIGHT, SAVED = "straight", "saved"
AGAIN = (1, 3, 5)  # steps from which the run goes on
FIRST_POWER, WINDOW = 17, 1
"""of the loss scale: about what gradients bear, and doubled after each step, so that some are skipped"""


def with_workers(runner: Runner) -> Runner:
    """The same data, read by two processes."""
    loader = runner.train_dataloader
    workers = {"num_workers": 2, "worker_init_fn": obey_parent_only, "multiprocessing_context": "fork"}
    runner._train_dataloader = DataLoader(loader.dataset, sampler=loader.sampler, batch_size=None, **workers)
    return runner


def slow_write(write: Any, *args: Any) -> Any:
    time.sleep(0.2)
    return write(*args)


def train_all(directory: str) -> None:
    """Each way straight, without a checkpoint before the last; then saving; then from some of what was saved."""
    multiprocessing.current_process()._config["daemon"] = False  # the tests' ranks are, and could have no workers
    torch.amp.GradScaler = functools.partial(  # type: ignore[misc]
        torch.amp.GradScaler, init_scale=2.0**FIRST_POWER, growth_interval=WINDOW
    )
    zero_config.HALVES["fp16"] |= {"initial_scale_power": FIRST_POWER, "loss_scale_window": WINDOW}
    write = pending_save.write_snapshot
    for name, way in WAYS.items():
        home, settings = Path(directory) / name, way | {"precision": "fp16"}
        ending = [MetricsHook(interval=9), CheckpointHook(interval=None)]
        with_workers(runner_of(home / STRAIGHT, settings, hooks=ending)).train()
        beside = [MetricsHook(interval=9), CheckpointHook(interval=1, keep=None, async_save=True)]
        pending_save.write_snapshot = functools.partial(slow_write, write)
        with_workers(runner_of(home / SAVED, settings, hooks=beside)).train()
        pending_save.write_snapshot = write
        for step in AGAIN:
            ending = [MetricsHook(interval=9), CheckpointHook(interval=None)]
            checkpoint = checkpoint_path(home / SAVED, step)
            with_workers(runner_of(home / str(step), settings, hooks=ending, checkpoint=checkpoint)).train()
        dist.barrier()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("beside")
    run_on_ranks(2, train_all, str(directory), timeout=500)
    return directory


def scaler(home: Path, step: int) -> dict[str, Any]:
    state = json.loads((checkpoint_path(home, step) / "state.json").read_text())["strategy"]["scaler"]
    return {name: state[name] for name in ("scale", "_growth_tracker")}


def random_states(home: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint_path(home, 6).glob("rng-*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_bit_for_bit_from_any_step_saved_beside_training(trained: Path, way: str):
    home = trained / way
    assert len(random_states(home / STRAIGHT)) == 2
    for run in (SAVED, *map(str, AGAIN)):
        skip = 0 if run == SAVED else int(run)
        assert trace(home / run) == trace(home / STRAIGHT)[skip:], run
        assert differing(tensors(home / run), tensors(home / STRAIGHT)) == [], run
        assert random_states(home / run) == random_states(home / STRAIGHT), run
        assert scaler(home / run, 6) == scaler(home / STRAIGHT, 6), run


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_scale_has_moved_both_ways_by_then(trained: Path, way: str):
    """Else a scale that is lost would not have shown."""
    skips = [row["skipped"] for row in rows(trained / way / STRAIGHT)]
    scales = [scaler(trained / way / SAVED, step)["scale"] for step in range(1, 7)]
    assert {"overflow", None} <= set(skips), (skips, scales)
    assert any(later < earlier for earlier, later in pairwise(scales)), (skips, scales)
    assert any(later > earlier for earlier, later in pairwise(scales)), (skips, scales)
