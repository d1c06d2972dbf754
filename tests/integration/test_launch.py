"""`tuner prepare` and `tuner train --nproc 2` as a user runs them: prepared once, one message, on from a checkpoint."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tuner.cli import run
from tuner.config import render
from tuner.dataset.build import build_shards
from tuner.demo.files import resolve
from tuner.model.tokenizer import build_tokenizer

NUM_ROWS = 40
USERS_CODE = """
import os
import signal
import time
from pathlib import Path
from mmengine.hooks import Hook

HERE = Path(__file__).parent


def to_sample(row):
    with open(HERE / "converted", "a") as file:
        file.write("x")
    return row


class FailOnce(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ["RANK"] == "1" and batch_idx == 4 and not (HERE / "failed").exists():
            (HERE / "failed").touch()
            raise ZeroDivisionError("the user's own")


class SlowThenStopped(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ["RANK"] == "0" and batch_idx == 2:
            time.sleep(4)  # as a long sampled chat: more than the timeout
        if os.environ["RANK"] == "1" and batch_idx == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
"""
TIMEOUT = 3


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model and 40 rows, counted as they are converted; rank 1 fails once, in step 5, where a hook is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_code", raising=False)  # of the test before
    (tmp_path / "users_code.py").write_text(USERS_CODE)
    shutil.copytree(resolve("demo:model"), tmp_path / "model")
    sizes = json.loads((tmp_path / "model" / "config.json").read_text())
    sizes.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes.update(num_key_value_heads=2)
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    turns = [[("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")] for number in range(40)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings: dict[str, Any] = {
        "model_path": str(tmp_path / "model"), "weights": "random", "data_path": str(tmp_path / "rows.jsonl"),
        "data_format": "users_code:to_sample", "cache_dir": str(tmp_path / "cache"), "max_length": 128,
        "num_accumulation_steps": 1, "num_epochs": 2, "max_steps": None, "precision": "fp32",
        "gradient_checkpointing": False, "log_interval": 1, "save_interval": 3, "sample_interval": 0,
    }  # fmt: skip
    path = tmp_path / "tiny.py"
    path.write_text(render("internlm2_tiny-sft_full", settings))
    failing = "\nfrom users_code import FailOnce\ncustom_hooks = [*custom_hooks, dict(type=FailOnce)]\n"
    (tmp_path / "failing.py").write_text(path.read_text() + failing)
    return path


def num_converted(folder: Path) -> int:
    return len((folder / "converted").read_text())


def test_prepare_needs_no_weights_and_prints_the_ledger(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    assert not list((tmp_path / "model").glob("*.safetensors")), "there are no weights to be had"
    assert run(["prepare", str(config), "weights=pretrained"]) == 0
    told = capfd.readouterr().out
    assert f"{NUM_ROWS} documents in " in told
    assert "The data is ready" in told
    assert num_converted(tmp_path) == NUM_ROWS


def test_a_rank_that_fails_is_told_alone_after_what_rank_0_printed(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    assert run(["prepare", str(config)]) == 0
    capfd.readouterr()
    arguments = ["train", "failing.py", "--nproc", "2", "--work-dir", "work"]
    assert run(arguments) == 1
    out, errors = capfd.readouterr()
    assert num_converted(tmp_path) == NUM_ROWS, "the ranks opened what was prepared"
    assert out.count("documents in ") == 1, "one rank prints"
    log = tmp_path / "work" / "logs" / "rank_1.log"
    message = "rank 1: ZeroDivisionError: the user's own (run with --debug for the traceback)\n"
    assert errors.endswith(f"{message}What else it said is in {log}\n")
    assert "Traceback" not in errors + out
    assert errors.count("rank") == 3
    assert "documents in " in log.read_text()


@pytest.mark.slow
def test_a_restarted_run_goes_on_from_its_checkpoint(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    arguments = ["train", "failing.py", "--nproc", "2", "--work-dir", "work", "--max-restarts", "1"]
    assert run(arguments) == 0
    out, errors = capfd.readouterr()
    assert "all ranks are started again (1 of 1 restarts)" in errors
    assert "from step 3" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_a_stopped_rank_is_named_and_a_slow_one_is_not(tmp_path: Path, capfd: pytest.CaptureFixture):
    hook = "\nfrom users_code import SlowThenStopped\ncustom_hooks = [*custom_hooks, dict(type=SlowThenStopped)]\n"
    with (tmp_path / "tiny.py").open("a") as file:
        file.write(hook)
    arguments = ["train", "tiny.py", f"rank_timeout={TIMEOUT}", "--nproc", "2", "--work-dir", "work"]
    assert run(arguments) == 3
    out, errors = capfd.readouterr()
    assert "step 5/" in out, "the slow hook of step 3 raised no alarm"
    assert "rank 0: Error: Rank 1: gives no sign of life: stopped" in errors
    assert "Rank 0 has been in step 6 (forward and backward) for " in errors
    assert "Traceback" not in errors + out
    listed = json.loads((tmp_path / "work" / "lost_rank_step_6.json").read_text())
    assert listed["step"] == 6
    assert f"{tmp_path / 'rows.jsonl'}:" in listed["documents"]["rank 1"][0]
    assert listed["documents"]["rank 1"][0] in errors
    rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["imbalance"] >= 1
        assert 0 <= row["least_wait_seconds"] <= row["wait_seconds"]
        assert row["memory_rank"] in (0, 1)
        assert row["tokens_per_second_per_device"] == pytest.approx(row["tokens_per_second"] / 2)
    assert "waits " in out
    assert "peak x 2 devices" in out


def test_a_mistake_is_told_before_a_process_starts(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    assert run(["train", str(config), "lr=-1.0", "--nproc", "2", "--work-dir", "work"]) == 2
    assert capfd.readouterr().err.count("allowed is a number above 0") == 1
    assert not (tmp_path / "work").exists()


def prepare_slowly(folder: Path) -> None:
    """Tokenise as one rank of several would, with a function that counts its rows."""

    def to_sample(row: dict) -> dict:
        time.sleep(0.02)
        with open(folder / "converted", "a") as file:
            file.write("x")
        return row

    build_shards(
        str(folder / "rows.jsonl"), data_format=to_sample, chat_template="internlm2", max_length=128,
        tokenizer=build_tokenizer("demo:model"), cache_dir=folder / "cache",
    )  # fmt: skip


@pytest.mark.usefixtures("config")
def test_of_two_ranks_one_prepares(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=prepare_slowly, args=(tmp_path,)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert num_converted(tmp_path) == NUM_ROWS
    assert os.listdir(tmp_path / "cache")
