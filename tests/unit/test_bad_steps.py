"""A step that is not finite, or a spike, leaves no trace but in the log; what comes after three, or a rollback."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stub_training import make_runner, tiny_llm
from test_engine_resume import chat_hook

from tuner.engine import bad_steps
from tuner.engine.bad_steps import BadSteps
from tuner.engine.checkpoint import checkpoint_path, list_checkpoints
from tuner.engine.frame import Hook
from tuner.engine.hooks import CheckpointHook, CurvesHook, MetricsHook
from tuner.engine.loop import NonFiniteError
from tuner.engine.replicated import Replicated
from tuner.engine.runner import Runner
from tuner.errors import UserError

NAN = float("nan")


def poisoned(work_dir: Path, factors: dict[int, float], **keywords: Any) -> Runner:
    """A run whose logits in some steps (counted from 0) are multiplied by something that they should not be."""
    llm = tiny_llm()

    def poison(module: torch.nn.Module, inputs: tuple) -> tuple | None:
        factor = factors.get(runner.strategy.step)
        return None if factor is None else (inputs[0] * factor,)

    llm.lm_head.register_forward_pre_hook(poison)
    keywords.setdefault("hooks", [MetricsHook(interval=9), CheckpointHook(interval=2)])
    runner = make_runner(work_dir, llm=llm, **keywords)
    return runner


def rows(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (work_dir / "metrics.jsonl").open()]


def tensors(work_dir: Path, step: int = 6) -> dict[str, torch.Tensor]:
    path = checkpoint_path(work_dir, step)
    kinds = ("model", "optimizer")
    return {f"{kind}.{name}": tensor for kind in kinds
            for name, tensor in load_file(path / f"{kind}-00000-of-00001.safetensors").items()}  # fmt: skip


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def left_out_by_hand(step_left_out: int) -> Runner:
    runner = make_runner(Path("unused"), hooks=[])
    loader, strategy = runner.train_dataloader, runner.strategy
    strategy.prepare(
        runner.model, optim_wrapper=runner.optim_wrapper, param_scheduler=runner.param_schedulers, num_steps=6
    )
    for step in range(6):
        if step == step_left_out:
            strategy.step += 1
        else:
            strategy.train_step(loader.dataset[loader.sampler.plan(step)])
    return runner


def test_a_skipped_step_is_one_left_out_by_hand_bit_for_bit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hooks = [MetricsHook(interval=9), CheckpointHook(interval=None), CurvesHook()]
    poisoned(tmp_path / "run", {3: NAN}, hooks=hooks).train()
    by_hand = left_out_by_hand(3)
    expected = {f"model.{name}": value for name, value in by_hand.model.llm.named_parameters()}
    found = tensors(tmp_path / "run")
    assert_equal({name: value for name, value in found.items() if name.startswith("model.")}, expected)
    assert {value.item() for name, value in found.items() if name.endswith(".step")} == {5.0}, "Adam counts 5 of 6"

    kept = rows(tmp_path / "run")
    assert [row["skipped"] for row in kept] == [None, None, None, "nonfinite", None, None]
    assert (kept[3]["loss"], kept[3]["grad_norm"]) == (None, None)
    assert kept[3]["trained_tokens"] == kept[2]["trained_tokens"]
    report = json.loads((tmp_path / "run" / "nonfinite_step_4.json").read_text())
    plan = by_hand.train_dataloader.sampler.plan(3)
    assert report == {"step": 4, "problem": "loss nan, gradient norm nan", "ranks": [0],
                      "documents": by_hand.train_dataloader.dataset.document_ids(plan)}  # fmt: skip
    output = capsys.readouterr().out
    assert "step 4/6  epoch 2  loss -" in output
    assert "(loss or gradient not finite: step skipped" in output
    assert "1 steps were skipped" in output


def test_three_bad_steps_in_a_row_are_too_many_also_across_a_resume(tmp_path):
    with pytest.raises(NonFiniteError, match=r"Step 5 of 6 .*the last of 3 bad steps in a row; training stopped"):
        poisoned(tmp_path / "a", {2: NAN, 3: NAN, 4: NAN}).train()
    assert [path.name for path in list_checkpoints(tmp_path / "a")] == ["step_00000002", "step_00000004"]
    resumed = poisoned(tmp_path / "a", {4: NAN}, checkpoint=checkpoint_path(tmp_path / "a", 4))
    with pytest.raises(NonFiniteError, match=r"Step 5 of 6 .*the last of 3 bad steps in a row"):
        resumed.train()
    poisoned(tmp_path / "b", {1: NAN, 2: NAN, 4: NAN, 5: NAN}).train()
    assert [row["skipped"] for row in rows(tmp_path / "b")] == [None, "nonfinite", "nonfinite", None] + [
        "nonfinite"
    ] * 2


def test_a_rollback_repeats_the_steps_but_the_bad_one_and_a_resume_does_so_too(tmp_path, capsys):
    poisoned(tmp_path / "skip", {3: NAN}).train()
    loop = {"on_nonfinite": "rollback"}
    poisoned(tmp_path / "back", {3: NAN}, loop=loop).train()
    assert_equal(tensors(tmp_path / "skip"), tensors(tmp_path / "back"))
    assert "step 4 was nonfinite: back to step 2; stepping over 4 this time" in capsys.readouterr().out
    kept = rows(tmp_path / "back")
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped"] for row in kept] == [None, None, None, "stepped over", None, None]
    assert json.loads((checkpoint_path(tmp_path / "back", 4) / "state.json").read_text())["bad_steps"]["passed"] == [3]

    loop["rollback_steps"] = 2
    poisoned(tmp_path / "two", {5: NAN}, loop=loop).train()
    assert [row["skipped"] for row in rows(tmp_path / "two")] == [None] * 4 + ["stepped over"] * 2
    poisoned(tmp_path / "none", {0: NAN}, loop=loop).train()
    assert "there is no checkpoint to go back to: it is skipped" in capsys.readouterr().out


class StopAfterRollback(Hook):
    def after_rollback(self, runner: Runner) -> None:
        (Path(runner.work_dir) / "stop").touch()


def test_a_rollback_samples_each_step_once(tmp_path, monkeypatch):
    hooks = [CheckpointHook(interval=2), chat_hook(monkeypatch)]
    poisoned(tmp_path, {3: NAN}, loop={"on_nonfinite": "rollback"}, hooks=hooks).train()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert [row["step"] for row in samples] == [1, 2, 3, 4, 5, 6]


def test_what_a_rollback_left_out_stays_left_out_after_a_resume(tmp_path):
    """Stopped and saved between the rollback's end and the bad step, and then the documents are finite."""
    poisoned(tmp_path / "skip", {5: NAN}).train()
    loop = {"on_nonfinite": "rollback"}
    hooks = [MetricsHook(), CheckpointHook(interval=4), StopAfterRollback()]
    poisoned(tmp_path / "back", {5: NAN}, loop=loop, hooks=hooks).train()
    assert [path.name for path in list_checkpoints(tmp_path / "back")] == ["step_00000004", "step_00000005"]
    assert not (tmp_path / "back" / "stop").exists()
    make_runner(tmp_path / "back", checkpoint=checkpoint_path(tmp_path / "back", 5), loop=loop).train()
    assert rows(tmp_path / "back")[-1]["skipped"] == "stepped over"
    assert_equal(tensors(tmp_path / "skip"), tensors(tmp_path / "back"))


def test_a_spike_is_as_bad_where_a_factor_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "SPIKE_START", 3)
    poisoned(tmp_path / "off", {4: 400.0}).train()
    assert {row["skipped"] for row in rows(tmp_path / "off")} == {None}
    poisoned(tmp_path / "on", {4: 400.0}, loop={"spike_factor": 2}).train()
    kept = rows(tmp_path / "on")
    assert [row["skipped"] for row in kept] == [None, None, None, None, "spike", None]
    assert kept[4]["loss"] > 2 * kept[3]["loss"]
    assert "the loss is above" in json.loads((tmp_path / "on" / "nonfinite_step_5.json").read_text())["problem"]


def test_a_nan_under_fp16_is_no_overflow_and_an_overflow_no_nan(tmp_path):
    runner = poisoned(tmp_path, {1: NAN}, strategy=Replicated(precision="fp16"), loop={"max_nonfinite_steps": 2})
    scales = []
    update = runner.strategy.update
    runner.strategy.update = lambda norm: (update(norm), scales.append(runner.strategy.scaler.get_scale()))
    runner.train()
    kept = [row["skipped"] for row in rows(tmp_path)]
    assert kept[1] == "nonfinite"
    overflows = kept.count("overflow")
    assert scales[-1] == 2.0 ** (16 - overflows), "only overflows halve the scale"
    assert kept[-1] is None


def test_what_counts_as_a_row_and_as_a_spike():
    steps = BadSteps(spike_factor=3.0)
    assert [steps.refuse(step) for step in (1, 2, 4, 6, 5)] == ["skip", "skip", "skip", "skip", "skip"]
    assert (steps.num_in_a_row(2), steps.num_in_a_row(4), steps.num_in_a_row(6), steps.num_in_a_row(3)) == (2, 1, 3, 0)
    for loss in range(19):
        steps.keep(float(loss))
    assert steps.loss_limit == float("inf")
    steps.keep(19.0)
    assert steps.loss_limit == 3 * 9.5
    again = BadSteps(spike_factor=3.0)
    again.restore(json.loads(json.dumps(steps.state())))
    assert (again.loss_limit, again.refused, again.num_in_a_row(6)) == (28.5, {1, 2, 4, 5, 6}, 3)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown. Choose one of skip, rollback, stop"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0: choose 1 or more"),
        ({"rollback_steps": 0}, "rollback_steps=0: choose 1 or more"),
        ({"spike_factor": 1.0}, "spike_factor=1.0: choose a number above 1"),
    ],
)
def test_settings_that_make_no_sense(settings, problem):
    with pytest.raises(UserError, match=problem):
        BadSteps(**settings)


def in_backward(work_dir: Path, bad_gradient: int | None, is_within: bool, **keywords: Any) -> Runner:
    """Nine steps of one micro-batch, not clipped; in one of them the gradient, but not the loss, is NaN."""
    runner = poisoned(work_dir, keywords.pop("factors", {}), **keywords)
    optimizer = runner.optim_wrapper["optimizer"]
    runner.optim_wrapper = {"optimizer": optimizer, "in_backward": is_within}
    runner.train_dataloader.sampler.__init__(runner.train_dataloader.dataset, 1, 1)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (NAN if runner.strategy.step == bad_gradient else 1)

    def watch(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(poison)

    runner.model.llm.model.norm.register_forward_hook(watch)
    return runner


def test_an_optimizer_in_backward_goes_back_where_another_skips_to_the_same_weights(tmp_path, capsys):
    """A gradient that is not finite is known once it has been used, whatever `on_nonfinite` says."""
    in_backward(tmp_path / "skip", 4, False).train()
    in_backward(tmp_path / "back", 4, True).train()
    assert_equal(tensors(tmp_path / "skip", 9), tensors(tmp_path / "back", 9))
    assert "step 5 was spoiled: back to step 4; stepping over 5 this time" in capsys.readouterr().out
    assert [row["skipped"] for row in rows(tmp_path / "back")] == [None] * 4 + ["stepped over"] + [None] * 4
    assert json.loads((tmp_path / "back" / "nonfinite_step_5.json").read_text())["ranks"] == []


def test_it_ends_where_there_is_nothing_to_go_back_to_or_settings_say_so(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1 of 9 was not finite.* no checkpoint to go back to.* start again"):
        in_backward(tmp_path / "first", 0, True).train()
    assert list_checkpoints(tmp_path / "first") == []
    with pytest.raises(NonFiniteError, match=r"Step 6 of 9 is not finite .*go on with --resume"):
        in_backward(tmp_path / "stop", 5, True, loop={"on_nonfinite": "stop"}).train()
    assert [path.name for path in list_checkpoints(tmp_path / "stop")] == ["step_00000002", "step_00000004"]


def test_it_skips_losses_that_are_not_finite_or_spikes_before_they_move_a_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "SPIKE_START", 3)
    for name, is_within in (("behind", False), ("within", True)):
        factors, loop = {4: NAN, 6: 4000.0}, {"spike_factor": 2}
        in_backward(tmp_path / name, None, is_within, factors=factors, loop=loop).train()
        assert [row["skipped"] for row in rows(tmp_path / name)][4:7] == ["nonfinite", None, "spike"]
    assert_equal(tensors(tmp_path / "behind", 9), tensors(tmp_path / "within", 9))
