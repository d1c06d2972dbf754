"""On two ranks: a signal to one saves the same step on both; a NaN on one makes both leave the step out."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from stub_training import make_runner, tiny_llm
from test_bad_steps import rows

import tuner.engine.zero  # noqa: F401  so that the ranks start with DeepSpeed
from tuner.engine.checkpoint import checkpoint_path, list_checkpoints
from tuner.engine.frame import Hook
from tuner.engine.fsdp import FullyShard
from tuner.engine.hooks import CheckpointHook, MetricsHook
from tuner.engine.runner import Runner
from tuner.engine.strategies import build_strategy
from tuner.engine.world import World
from tuner.parallel.mesh import build_mesh

QUICK = {"replicated": {}, "zero1": {"deepspeed": "zero1"}}
MORE = {"zero2": {"deepspeed": "zero2"}, "zero3": {"deepspeed": "zero3"}, "fsdp": {"fsdp": "full"}}
STRAIGHT, STOPPED, SKIPPED, ROLLED_BACK = "straight", "stopped", "skipped", "rolled_back"
BY_HAND = "by_hand.safetensors"
NUM_STEPS = 6
BAD = 3  # the step, from 0, in which the second rank has a NaN


class SignalSecondRank(Hook):
    """Once step 2 is done; the first rank learns of it from the facts of step 3 only."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        if runner.strategy.step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not runner.train_loop.stop.asked():
                time.sleep(0.01)


def runner_of(work_dir: Path, settings: dict[str, str], *, poison: bool = False, **keywords: Any) -> Runner:
    """Its parts are new; ranks drop other units out."""
    build = FullyShard if "fsdp" in settings else build_strategy  # which asks a launcher's variables for it
    strategy = build(device="cpu", **{"precision": "fp32"} | settings)
    rank = dist.get_rank()
    strategy.place(World(rank, 2, rank, 2), build_mesh(strategy.degrees))
    llm = tiny_llm(attention_dropout=0.3)

    def spoil(module: torch.nn.Module, inputs: tuple) -> tuple | None:
        return (inputs[0] * float("nan"),) if strategy.step == BAD and rank == 1 else None

    if poison:
        llm.lm_head.register_forward_pre_hook(spoil)
    keywords.setdefault("hooks", [MetricsHook(interval=9), CheckpointHook(interval=2, keep=None)])
    runner = make_runner(work_dir, strategy=strategy, llm=llm, **keywords)
    torch.manual_seed(rank)
    return runner


def leave_out_by_hand(settings: dict[str, str], file: Path) -> None:
    """Save weights and optimizer state of a run without the step's update, after drawing what its forward pass drew."""
    runner = runner_of(Path("unused"), settings)
    loader, strategy, step = runner.train_dataloader, runner.strategy, 0
    strategy.prepare(
        runner.model, optim_wrapper=runner.optim_wrapper, param_scheduler=runner.param_schedulers, num_steps=NUM_STEPS
    )
    while step < NUM_STEPS:
        batches = loader.dataset[loader.sampler.plan(step)]
        if step == BAD:
            strategy.step += 1
            with torch.no_grad():
                for batch in batches:
                    strategy.model(**batch)
        else:
            strategy.train_step(batches)
        step += 1
    tensors = {name: tensor.detach() for kind in strategy.state_tensors().values() for name, tensor in kind}
    if dist.get_rank() == 0:
        save_file(tensors, file)


def train_all(directory: str, ways: dict[str, dict[str, str]], rolled_back: bool) -> None:
    """Train in each way, with a stop, with a NaN, and with the step left out by hand."""
    for name, settings in ways.items():
        home = Path(directory) / name
        runner_of(home / STRAIGHT, settings).train()
        hooks = [MetricsHook(interval=9), CheckpointHook(interval=None), SignalSecondRank()]
        stopped = runner_of(home / STOPPED, settings, hooks=hooks)
        stopped.train()
        assert (stopped.strategy.step, stopped.train_loop.stopped_by) == (3, "by SIGUSR1 to rank 1")
        assert [path.name for path in list_checkpoints(home / STOPPED)] == ["step_00000003"]
        runner_of(home / STOPPED, settings, checkpoint=checkpoint_path(home / STOPPED, 3)).train()
        runner_of(home / SKIPPED, settings, poison=True).train()
        leave_out_by_hand(settings, home / BY_HAND)
        if rolled_back:
            back = {"on_nonfinite": "rollback"}
            runner_of(home / ROLLED_BACK, settings, poison=True, loop=back).train()


def tensors(work_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint_path(work_dir, NUM_STEPS).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def trace(work_dir: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "lr", "num_tokens", "trained_tokens")
    return [tuple(row[name] for name in names) for row in rows(work_dir)]


def check_ways(directory: Path, ways: dict[str, dict[str, str]]) -> None:
    run_on_ranks(2, train_all, str(directory), ways, ways == MORE, timeout=400)
    for name in ways:
        home = directory / name
        assert trace(home / STOPPED) == trace(home / STRAIGHT), name
        assert differing(tensors(home / STOPPED), tensors(home / STRAIGHT)) == [], name
        assert [row["skipped"] for row in rows(home / SKIPPED)] == [None] * BAD + ["nonfinite"] + [None] * 2
        assert differing(tensors(home / SKIPPED), load_file(home / BY_HAND)) == [], name
        assert differing(tensors(home / SKIPPED), tensors(home / STRAIGHT)) != [], name
        report = json.loads((home / SKIPPED / f"nonfinite_step_{BAD + 1}.json").read_text())
        assert report["ranks"] == [1], "whose loss it was"


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_one_ranks_signal_and_one_ranks_nan_are_everybodys(tmp_path: Path):
    check_ways(tmp_path, QUICK)


@pytest.mark.slow
def test_so_they_are_however_a_model_is_held_and_all_go_back(tmp_path: Path):
    check_ways(tmp_path, MORE)
    for home in (tmp_path / name for name in MORE):
        skips = [row["skipped"] for row in rows(home / ROLLED_BACK)]
        assert skips == [None] * BAD + ["stepped over"] + [None] * 2
        assert trace(home / ROLLED_BACK)[:BAD] == trace(home / STRAIGHT)[:BAD], home
