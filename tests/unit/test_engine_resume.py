"""A resumed run is the uninterrupted one, bit for bit; what cannot be continued says why."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stub_training import make_runner, tiny_llm

from tuner.dataset.chat_template import CHAT_TEMPLATES
from tuner.engine import checkpoint as checkpoints
from tuner.engine import pending_save, sample_chat, saving
from tuner.engine.checkpoint import checkpoint_path, list_checkpoints, verify_checkpoint
from tuner.engine.hooks import CheckpointHook, CurvesHook, MetricsHook, SampleChatHook
from tuner.engine.loop import NonFiniteError
from tuner.engine.replicated import Replicated
from tuner.errors import UserError

DROPOUT = {"attention_dropout": 0.3}


class StoppedError(Exception):
    pass


class StopHook(MetricsHook):
    """Ends the process's work after a step, as a kill would, without any goodbye."""

    priority = "LOWEST"

    def __init__(self, step):
        self.step = step

    def before_train(self, runner):
        pass

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        if runner.strategy.step == self.step:
            raise StoppedError


def trace(work_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    norms = [None if row["grad_norm"] is None else row["grad_norm"].hex() for row in rows]  # None: an overflow
    return [(row["step"], row["epoch"], row["loss"].hex(), row["lr"].hex(), norm, row["trained_tokens"])
            for row, norm in zip(rows, norms)]  # fmt: skip


def chat_hook(monkeypatch) -> SampleChatHook:
    """The real hook over prompts that are already ids: the stub's vocabulary has no chat template."""
    hook = SampleChatHook(prompts=["w5 w6"], interval=1, max_new_tokens=4)

    def encode(runner):
        hook.inputs, hook.stop_ids = [[5, 6]], [2]

    monkeypatch.setattr(hook, "_encode", encode)
    return hook


def straight(work_dir: Path, **keywords) -> Path:
    make_runner(work_dir, hooks=[MetricsHook(interval=9), CheckpointHook(interval=None)], **keywords).train()
    return work_dir


def interrupted(work_dir: Path, step: int, monkeypatch, chat=False, **keywords) -> Path:
    hooks = [MetricsHook(interval=9), CheckpointHook(interval=step), StopHook(step + 1)]
    with pytest.raises(StoppedError):
        make_runner(work_dir, hooks=hooks + [chat_hook(monkeypatch)] * chat, **keywords).train()
    torch.manual_seed(12345)  # a new process knows nothing of the old one's random states
    hooks = [MetricsHook(interval=9), CheckpointHook(interval=None)]
    checkpoint = checkpoint_path(work_dir, step)
    make_runner(work_dir, hooks=hooks + [chat_hook(monkeypatch)] * chat, checkpoint=checkpoint, **keywords).train()
    return work_dir


def test_what_is_written_beside_training_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    """Each write begins only when training has changed the tensors again; every checkpoint is compared."""
    make_runner(tmp_path / "a", hooks=[MetricsHook(), CheckpointHook(interval=2, keep=None)], **DROPOUT).train()
    step = threading.Semaphore(0)

    class Release(StopHook):
        def after_train_iter(self, runner, batch_idx, data_batch, outputs):
            if runner.strategy.step in (3, 5):
                step.release()

        def after_run(self, runner):
            pass

    def late(snapshot, draft, world):
        if snapshot.step < 6:
            assert step.acquire(timeout=60)
            seen.append(snapshot.step)
        return write(snapshot, draft, world)

    seen, write = [], pending_save.write_snapshot
    monkeypatch.setattr(pending_save, "write_snapshot", late)
    hooks = [Release(0), MetricsHook(), CheckpointHook(interval=2, keep=None, async_save=True)]
    make_runner(tmp_path / "b", hooks=hooks, **DROPOUT).train()
    assert seen == [2, 4]
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    for number in (2, 4, 6):
        assert_same_checkpoint(*(checkpoint_path(tmp_path / run, number) for run in "ab"))
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["save_seconds"] > 0 for row in rows] == [False, False, True, False, True, False]


def test_a_run_that_saves_beside_training_resumes_bit_for_bit(tmp_path):
    first = straight(tmp_path / "straight", **DROPOUT)
    hooks = [MetricsHook(), CheckpointHook(interval=2, async_save=True), StopHook(5)]
    with pytest.raises(StoppedError):
        make_runner(tmp_path / "again", hooks=hooks, **DROPOUT).train()
    assert [path.name for path in list_checkpoints(tmp_path / "again")] == ["step_00000002", "step_00000004"]
    hooks = [MetricsHook(), CheckpointHook(interval=None, async_save=True)]
    make_runner(tmp_path / "again", hooks=hooks, checkpoint=checkpoint_path(tmp_path / "again", 4), **DROPOUT).train()
    assert trace(first) == trace(tmp_path / "again")
    assert_same_checkpoint(*(checkpoint_path(path, 6) for path in (first, tmp_path / "again")))
    runs = {checkpoints.read_manifest(path)["run"] for path in list_checkpoints(tmp_path / "again")}
    assert len(runs) == 1, "it is the same run that goes on"
    assert runs.isdisjoint({checkpoints.read_manifest(checkpoint_path(first, 6))["run"]})


def test_a_copy_of_each_checkpoint_is_kept_elsewhere_and_a_full_disk_there_is_a_warning(tmp_path, capsys, monkeypatch):
    hooks = [CheckpointHook(interval=3, keep=1, copy_to=str(tmp_path / "cold"))]
    make_runner(tmp_path / "run", hooks=hooks).train()
    copies = list_checkpoints(tmp_path / "cold" / "run")
    assert [path.name for path in copies] == ["step_00000003", "step_00000006"]
    for path in copies:
        verify_checkpoint(path)
    assert len(list_checkpoints(tmp_path / "run")) == 1
    monkeypatch.setattr(checkpoints.shutil, "copyfile", lambda *paths: raise_full())
    make_runner(tmp_path / "other", hooks=[CheckpointHook(interval=3, copy_to=str(tmp_path / "cold"))]).train()
    assert list_checkpoints(tmp_path / "cold" / "other") == []
    assert "warning: step_00000006 could not be copied to" in capsys.readouterr().out
    assert len(list_checkpoints(tmp_path / "other")) == 2


def test_a_disk_for_copies_that_hangs_is_a_warning_at_the_end_of_the_run(tmp_path, capsys, monkeypatch):
    answers, copyfile = threading.Event(), shutil.copyfile

    def hang(*paths):
        assert answers.wait(60)
        return copyfile(*paths)

    monkeypatch.setattr(checkpoints.shutil, "copyfile", hang)
    hooks = [CheckpointHook(interval=3, copy_to=str(tmp_path / "cold"))]
    make_runner(tmp_path / "run", hooks=hooks, loop={"rank_timeout": 0.2}).train()
    told = capsys.readouterr().out
    assert "step_00000006 is still not copied to" in told
    assert f"The checkpoint is whole in {tmp_path / 'run' / 'checkpoints'}" in told
    assert list_checkpoints(tmp_path / "cold" / "run") == []
    verify_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    answers.set()


def test_the_best_by_the_mean_loss_since_the_one_before_and_every_fourth_step_stay(tmp_path):
    """Token-weighted means, from the log of each step; a resumed run has those of the uninterrupted one."""
    hooks = [MetricsHook(), CheckpointHook(interval=2, keep=None)]
    make_runner(tmp_path / "all", hooks=hooks).train()
    rows = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    means = {
        step: sum(row["loss"] * row["num_loss_tokens"] for row in rows[step - 2 : step])
        / sum(row["num_loss_tokens"] for row in rows[step - 2 : step])
        for step in (2, 4, 6)
    }
    assert loss_in(tmp_path / "all") == pytest.approx(means, rel=1e-12)
    keeping = {"keep": 1, "keep_every": 4, "keep_best": True}
    make_runner(tmp_path / "some", hooks=[CheckpointHook(interval=2, **keeping)]).train()
    best = min(means, key=means.__getitem__)
    assert set(loss_in(tmp_path / "some")) == {4, 6, best}
    assert (tmp_path / "some" / "checkpoints" / "best").read_text() == f"step_{best:08d}\n"
    resumed = make_runner(tmp_path / "on", hooks=hooks, checkpoint=checkpoint_path(tmp_path / "all", 2))
    resumed.train()
    assert loss_in(tmp_path / "on") == {step: loss for step, loss in loss_in(tmp_path / "all").items() if step > 2}


def loss_in(work_dir: Path) -> dict[int, float]:
    return {checkpoints.step_of(path): checkpoints.loss_of(path) for path in list_checkpoints(work_dir)}


def raise_full():
    raise OSError(28, "No space left on device")


def assert_same_checkpoint(one: Path, other: Path) -> None:
    names = [path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(names) >= 8
    assert [str(name) for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.mark.parametrize(
    ("step", "keywords", "chat"),
    [
        (2, {}, False),
        (3, {}, False),  # the epoch boundary itself
        (4, {"attention_dropout": 0.3}, False),  # in the second epoch
        (2, {"attention_dropout": 0.3}, True),
        (1, {"attention_dropout": 0.3}, False),  # within the warm-up
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, step, keywords, chat):
    first = straight(tmp_path / "straight", **keywords)
    second = interrupted(tmp_path / "resumed", step, monkeypatch, chat, **keywords)
    assert trace(first) == trace(second)
    assert [row[0] for row in trace(first)] == [1, 2, 3, 4, 5, 6]
    for name in ("model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors", "rng-00000.json"):
        ours, theirs = (checkpoint_path(path, 6) / name for path in (first, second))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_fp16_resumes_with_its_loss_scale(tmp_path, monkeypatch):
    """A scale so large that the first steps are skipped: a fresh one would skip again after the resume."""
    large = functools.partial(torch.amp.GradScaler, init_scale=2.0**18)
    monkeypatch.setattr(torch.amp, "GradScaler", large)

    def strategy():
        return Replicated(precision="fp16")

    def run(work_dir, hooks, checkpoint=None):
        make_runner(work_dir, hooks=hooks, strategy=strategy(), checkpoint=checkpoint).train()

    run(tmp_path / "a", [MetricsHook(), CheckpointHook(interval=None)])
    with pytest.raises(StoppedError):
        run(tmp_path / "b", [MetricsHook(), CheckpointHook(interval=3), StopHook(4)])
    run(tmp_path / "b", [MetricsHook(), CheckpointHook(interval=None)], checkpoint_path(tmp_path / "b", 3))
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    state = json.loads((checkpoint_path(tmp_path / "b", 3) / "state.json").read_text())
    assert state["strategy"]["scaler"]["scale"] < 2.0**18
    skips = [json.loads(line)["skipped"] for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert skips[0] == "overflow"
    assert None in skips[3:], "a run that trains nothing would prove nothing"


def test_dropout_would_show_a_lost_random_state(tmp_path, monkeypatch):
    """The control of the test above: without the saved state the runs differ."""
    first = straight(tmp_path / "straight", attention_dropout=0.3)
    monkeypatch.setattr("tuner.engine.snapshot.restore_random_state", lambda state, devices: None)
    second = interrupted(tmp_path / "resumed", 3, monkeypatch, attention_dropout=0.3)
    assert trace(first)[:3] == trace(second)[:3]
    assert trace(first)[3] != trace(second)[3]


def test_sampled_chat_changes_no_bit_of_training(tmp_path, monkeypatch):
    for name, extra in (("silent", []), ("chatty", [chat_hook(monkeypatch)])):
        hooks = [MetricsHook(interval=9), CheckpointHook(interval=None), *extra]
        make_runner(tmp_path / name, hooks=hooks, attention_dropout=0.3).train()
    assert trace(tmp_path / "silent") == trace(tmp_path / "chatty")
    for name in ("model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors", "rng-00000.json"):
        files = [checkpoint_path(tmp_path / run, 6) / name for run in ("silent", "chatty")]
        assert files[0].read_bytes() == files[1].read_bytes()
    samples = [json.loads(line) for line in (tmp_path / "chatty" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_samples_each_step_once(tmp_path, monkeypatch):
    hooks = [CheckpointHook(interval=2, keep=None), chat_hook(monkeypatch)]
    make_runner(tmp_path, hooks=hooks).train()
    make_runner(tmp_path, hooks=[chat_hook(monkeypatch)], checkpoint=checkpoint_path(tmp_path, 4)).train()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 2, 3, 4, 5, 6]


def test_sampled_chat_restores_training_mode_even_of_frozen_parts(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, hooks=[chat_hook(monkeypatch)])
    runner.train()
    llm = runner.model.llm
    llm.train()
    llm.model.layers[0].eval()  # a part that a user holds in eval mode
    modes = [module.training for module in llm.modules()]
    hook = chat_hook(monkeypatch)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0, [], None)
    assert [module.training for module in llm.modules()] == modes


def test_a_checkpoint_has_everything_and_no_pickle(tmp_path):
    make_runner(tmp_path).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000006"]
    path = checkpoint_path(tmp_path, 6)
    verify_checkpoint(path)
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert names >= {
        "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors", "rng-00000.json",
        "state.json", "config.py",
        "manifest.json", "hf/config.json", "hf/generation_config.json", "hf/tokenizer.json", "hf/template.json",
    }  # fmt: skip
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".py"}
    assert set(load_file(path / "model-00000-of-00001.safetensors")) == {
        name for name, _ in tiny_llm().named_parameters()
    }
    note = json.loads((path / "hf" / "template.json").read_text())
    assert note == {"chat_template": "internlm2", "parallel_tool_calls": "template"}


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []

    def watch(work_dir, keep, **others):
        for path in list_checkpoints(work_dir):
            verify_checkpoint(path)
        seen.append([path.name for path in list_checkpoints(work_dir)])
        prune(work_dir, keep, **others)

    prune = saving.prune
    monkeypatch.setattr(saving, "prune", watch)
    make_runner(tmp_path, hooks=[CheckpointHook(interval=2, keep=1)]).train()
    assert seen == [["step_00000002"], ["step_00000002", "step_00000004"], ["step_00000004", "step_00000006"]]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000006"]


@pytest.mark.parametrize(
    "name", ["model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors", "state.json", "rng-00000.json"]
)
def test_a_damaged_checkpoint_is_refused_with_the_file_named(tmp_path, name):
    make_runner(tmp_path).train()
    path = checkpoint_path(tmp_path, 3)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 4
    (path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        make_runner(tmp_path / "other", checkpoint=path).train()


def test_other_data_or_another_seed_cannot_be_continued(tmp_path):
    settings = {"seed": 0, "max_length": 8, "lr": 1e-2, "log_interval": 1}
    make_runner(tmp_path, settings=settings).train()
    path = checkpoint_path(tmp_path, 3)
    for name, value in (("seed", 1), ("max_length", 16)):
        with pytest.raises(UserError, match=rf"other data: {name} was {settings[name]} and is {value}"):
            make_runner(tmp_path / "other", settings={**settings, name: value}, checkpoint=path).train()


def test_another_setting_that_matters_is_said_aloud_and_free_ones_are_not(tmp_path, capsys):
    settings = {"seed": 0, "lr": 1e-2, "log_interval": 1}
    make_runner(tmp_path, settings=settings).train()
    capsys.readouterr()
    changed = {"seed": 0, "lr": 1e-3, "log_interval": 7}
    make_runner(tmp_path / "other", settings=changed, checkpoint=checkpoint_path(tmp_path, 3)).train()
    output = capsys.readouterr().out
    assert "warning: resumed with a changed setting" in output
    assert "lr was 0.01 and is 0.001" in output
    assert "log_interval" not in output


def test_data_files_that_changed_under_the_same_settings_are_noticed(tmp_path):
    make_runner(tmp_path).train()
    runner = make_runner(tmp_path / "other", checkpoint=checkpoint_path(tmp_path, 3))
    runner._train_dataloader.dataset.shards.fingerprint = "other content"
    with pytest.raises(UserError, match="would now read other documents"):
        runner.train()


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path):
    make_runner(tmp_path).train()
    other = tiny_llm()
    other.model.norm = torch.nn.LayerNorm(16)
    with pytest.raises(UserError, match=r"another model.*model\.norm\.bias"):
        make_runner(tmp_path / "other", llm=other, checkpoint=checkpoint_path(tmp_path, 3)).train()


def test_a_model_that_computes_otherwise_and_another_tokenizer_are_refused_with_what_differs(tmp_path):
    make_runner(tmp_path).train()
    path, other = checkpoint_path(tmp_path, 3), tiny_llm()
    other.config.rms_norm_eps = 0.25
    with pytest.raises(UserError, match=r"another model \(1 differences\): rms_norm_eps was 1e-06 and is 0.25\."):
        make_runner(tmp_path / "other", llm=other, checkpoint=path).train()
    runner = make_runner(tmp_path / "other", checkpoint=path)
    runner.record.tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match=r"another tokenizer \(2 differences\): tokens was 64 and is 65"):
        runner.train()


def test_resuming_a_finished_run_trains_nothing_more(tmp_path):
    make_runner(tmp_path).train()
    before = trace(tmp_path)
    make_runner(tmp_path, checkpoint=checkpoint_path(tmp_path, 6)).train()
    assert trace(tmp_path) == before


def test_a_loss_that_becomes_nan_ends_the_run_where_asked_to_with_the_documents_saved(tmp_path):
    llm = tiny_llm()

    def poison(module, inputs):
        if runner.strategy.step == 4:
            return (inputs[0] * float("nan"),)

    llm.lm_head.register_forward_pre_hook(poison)
    runner = make_runner(tmp_path, llm=llm, loop={"on_nonfinite": "stop"})
    with pytest.raises(NonFiniteError, match=r"Step 5 of 6 is not finite \(loss nan"):
        runner.train()
    report = json.loads((tmp_path / "nonfinite_step_5.json").read_text())
    loader = runner.train_loop.dataloader
    assert report["documents"] == loader.dataset.document_ids(loader.sampler.plan(4))
    assert len(report["documents"]) == 6
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert issubclass(NonFiniteError, UserError)  # hence exit code 2


def test_a_weight_that_is_not_finite_is_never_published(tmp_path):
    class Poison(StopHook):
        priority = "VERY_HIGH"

        def after_train_iter(self, runner, batch_idx, data_batch, outputs):
            with torch.no_grad():
                runner.model.llm.lm_head.weight[0, 0] = float("inf")

    with pytest.raises(UserError, match=r"lm_head.* is not finite: no checkpoint of step 1 was published"):
        make_runner(tmp_path, hooks=[Poison(0), CheckpointHook(interval=1)]).train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_neither_is_an_optimizer_that_is_not_finite_also_beside_training(tmp_path):
    class Poison(StopHook):
        priority = "VERY_HIGH"

        def after_train_iter(self, runner, batch_idx, data_batch, outputs):
            if runner.strategy.step == 3:  # an infinite second moment stops its weight, and no loss ever shows it
                runner.strategy.optimizer.state[runner.model.llm.lm_head.weight]["exp_avg_sq"][1, 1] = float("inf")

    message = r"optimizer tensor lm_head.weight.exp_avg_sq is not finite: .* step 4 was published.* is .*step_00000002"
    with pytest.raises(UserError, match=message):
        make_runner(tmp_path, hooks=[Poison(0), CheckpointHook(interval=2, async_save=True)]).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_costs_a_warning_until_the_last_checkpoint(tmp_path, capsys, monkeypatch, async_save):
    def full(snapshot, draft, world):
        if snapshot.step > 1:
            (draft / "half").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(snapshot, draft, world)

    write = pending_save.write_snapshot
    monkeypatch.setattr(pending_save, "write_snapshot", full)
    with pytest.raises(UserError, match=r"step 6 could not be written.*No space left.*whole checkpoint is .*00000001"):
        make_runner(tmp_path, hooks=[CheckpointHook(interval=1, async_save=async_save)]).train()
    assert capsys.readouterr().err.count("warning: The checkpoint of step") == 4
    verify_checkpoint(checkpoint_path(tmp_path, 1))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000001", "latest"}


LIMITED = """
import sys
import threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stub_training import make_runner
from tuner.engine.hooks import CheckpointHook
from tuner.errors import UserError
try:
    make_runner(Path(sys.argv[1]), hooks=[CheckpointHook(interval=3)]).train()
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_a_write_that_the_system_really_refuses_leaves_no_half_checkpoint(tmp_path):
    """A limit on the size of files stands for a full disk: the write itself fails in the middle."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert "Training goes on" in done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_metrics_are_in_all_three_places_and_the_curves_are_drawn(tmp_path, capsys):
    hooks = [MetricsHook(interval=4), CheckpointHook(interval=3), CurvesHook()]
    make_runner(tmp_path, hooks=hooks).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row.keys() >= {"loss", "lr", "grad_norm", "tokens_per_second", "trained_tokens", "mfu", "hfu",
                              "memory_bytes", "seconds_left", "num_loss_tokens"}  # fmt: skip
        assert 0 < row["mfu"] <= row["hfu"] < 1
        assert row["memory_bytes"] > 50e6
        assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["step_seconds"])
    assert rows[-1]["seconds_left"] == 0
    assert rows[-1]["trained_tokens"] == sum(row["num_loss_tokens"] for row in rows)
    output = capsys.readouterr().out
    shown = [line.split()[1] for line in output.splitlines() if line.startswith("step ")]
    assert shown == ["1/6", "4/6", "6/6"]
    assert output.count("MFU = ") == 1
    assert output.count("saved ") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert scalars(tmp_path) == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def scalars(work_dir: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work_dir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def test_a_resumed_run_leaves_one_line_per_step_also_after_a_torn_one(tmp_path, monkeypatch):
    hooks = [MetricsHook(), CheckpointHook(interval=2), StopHook(5)]
    with pytest.raises(StoppedError):
        make_runner(tmp_path, hooks=hooks).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    make_runner(tmp_path, checkpoint=checkpoint_path(tmp_path, 2)).train()
    assert [row[0] for row in trace(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert len(scalars(tmp_path)) == 6


def test_a_text_prompt_is_continued_and_a_chat_prompt_is_answered():
    def text(prompt):
        segments = sample_chat.prompt_segments(prompt, CHAT_TEMPLATES["internlm2"])
        return "".join(segment.text for segment in segments)

    assert text("hello") == "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert text([{"role": "user", "content": "hello"}]) == text("hello")
    assert text({"text": "hello"}) == "<s>hello"


def test_a_work_dir_that_was_moved_resumes(tmp_path):
    make_runner(tmp_path / "here").train()
    shutil.rmtree(checkpoint_path(tmp_path / "here", 6))
    shutil.move(tmp_path / "here", tmp_path / "there")
    make_runner(tmp_path / "there", checkpoint=checkpoint_path(tmp_path / "there", 3)).train()
    assert [row[0] for row in trace(tmp_path / "there")] == [1, 2, 3, 4, 5, 6]


def test_a_model_of_unknown_cost_trains_without_mfu(tmp_path, capsys):
    llm = tiny_llm()
    object.__setattr__(llm.config, "layer_types", ["linear_attention", "full_attention"])
    make_runner(tmp_path, llm=llm, hooks=[MetricsHook(interval=1)]).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["mfu"] for row in rows} == {None}
    output = capsys.readouterr().out
    assert "warning: The cost of layers of type linear_attention is not known" in output
    assert "MFU -  HFU -" in output
