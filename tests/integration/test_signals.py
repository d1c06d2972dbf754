"""Signals as a user, a scheduler or another launcher sends them: 75, the same step saved, and on as if nothing was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.config import render
from tuner.demo.files import resolve

pytestmark = pytest.mark.slow
USERS_CODE = """
import os
import time
from pathlib import Path
from mmengine.hooks import Hook
from tuner.engine import pending_save


class Slow(Hook):
    priority = "LOWEST"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        rank = os.environ.get("RANK", "0")
        Path(runner.work_dir, f"pid_{rank}").write_text(str(os.getpid()))
        Path(runner.work_dir, f"done_{rank}").write_text(str(batch_idx + 1))
        time.sleep(float(os.environ.get("SLOW", "0")))
        if os.environ.get("HANG") == "data" and rank == "1" and batch_idx == 1:
            type(runner.train_loop.dataloader.dataset).document_ids = hang
        if os.environ.get("HANG") == "checkpoint" and rank == "1":
            pending_save.write_snapshot = hang


def hang(*_):
    Path(os.environ["HANG_FILE"]).write_text(str(time.time()))
    time.sleep(3600)
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 20 steps with two data workers, and a run of it that nobody disturbs."""
    home = tmp_path_factory.mktemp("signals")
    (home / "users_code.py").write_text(USERS_CODE)
    shutil.copytree(resolve("demo:model"), home / "model")
    sizes = json.loads((home / "model" / "config.json").read_text())
    sizes.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes.update(num_key_value_heads=2)
    (home / "model" / "config.json").write_text(json.dumps(sizes))
    turns = [[("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")] for number in range(40)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings: dict[str, Any] = {
        "model_path": str(home / "model"), "weights": "random", "data_path": str(home / "rows.jsonl"),
        "data_format": "openai", "cache_dir": str(home / "cache"), "max_length": 128, "pack": False,
        "num_accumulation_steps": 1, "num_epochs": 2, "max_steps": 20, "precision": "fp32",
        "gradient_checkpointing": False, "log_interval": 1, "save_interval": None, "sample_interval": 0,
    }  # fmt: skip
    text = render("internlm2_tiny-sft_full", settings)
    hook = "\nfrom users_code import Slow\ncustom_hooks = [*custom_hooks, dict(type=Slow)]\n"
    (home / "tiny.py").write_text(f"{text}{hook}train_dataloader = train_dataloader | dict(num_workers=2)\n")
    return home


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """`tuner train` with these options; what is left of it at the end of a test is killed."""
    started: list[subprocess.Popen] = []

    def begin(work_dir: str, *options: str, slow: float = 0.3, torchrun: bool = False) -> subprocess.Popen:
        module = [sys.executable, "-m"]
        if torchrun:
            module += ["torch.distributed.run", "--nproc-per-node", "2", "--shutdown-timeout", "300", "-m"]
        command = [*module, "tuner", "train", "tiny.py", "--work-dir", work_dir, *options]
        environment = {**os.environ, "PYTHONPATH": str(home), "SLOW": str(slow), "OMP_NUM_THREADS": "1"}
        with (home / f"{work_dir}.log").open("a") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(command, cwd=home, env=environment, start_new_session=True, **streams))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(work_dir: Path, step: int, num_ranks: int) -> None:
    """Return when all ranks have done it."""
    deadline = time.monotonic() + 300
    paths = [work_dir / f"done_{rank}" for rank in range(num_ranks)]
    while not all(path.exists() and int(path.read_text() or 0) >= step for path in paths):
        assert time.monotonic() < deadline, (work_dir.with_suffix(".log")).read_text()
        time.sleep(0.05)


def trace(work_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"].hex(), row["grad_norm"].hex(), row["lr"].hex()) for row in rows]


def saved(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").glob("step_*"))


def weights(work_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((work_dir / "checkpoints" / "step_00000020").glob("*-of-*"))]


def check_and_resume(home: Path, start: Start, work_dir: str, *options: str) -> None:
    """What was saved is the last step that was made; the rest of the run is that of one which nobody disturbed."""
    path = home / work_dir
    log = path.with_suffix(".log").read_text()
    made = trace(path)
    assert saved(path) == [f"step_{len(made):08d}"], log
    assert 2 < len(made) < 20
    assert f"after step {len(made)} of 20, which is saved. Go on with --resume auto." in log
    assert "Traceback" not in log or work_dir == "torchrun", "which shows its own"
    assert start(work_dir, *options, "--resume", "auto", slow=0).wait(300) == 0, path.with_suffix(".log").read_text()
    straight = f"straight_{len(options)}"
    if not (home / straight).exists():
        assert start(straight, *options, slow=0).wait(300) == 0
    assert trace(path) == trace(home / straight)
    assert weights(path) == weights(home / straight)


def test_ctrl_c_to_a_process_and_its_data_workers(home: Path, start: Start):
    process = start("alone")
    wait_for_step(home / "alone", 2, 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(120) == 75, (home / "alone.log").read_text()
    check_and_resume(home, start, "alone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_or_to_one_rank(home: Path, start: Start, number: signal.Signals):
    process = start(number.name, "--nproc", "2")
    wait_for_step(home / number.name, 2, 2)
    rank = int((home / number.name / "pid_1").read_text())
    if number == signal.SIGTERM:
        process.send_signal(number)
        os.killpg(rank, number)  # and to the group of a rank, data workers included, as SLURM does to all
    else:
        os.kill(rank, number)
    assert process.wait(120) == 75, (home / f"{number.name}.log").read_text()
    check_and_resume(home, start, number.name, "--nproc", "2")


def test_torchrun_passes_a_signal_on(home: Path, start: Start):
    process = start("torchrun", torchrun=True)
    wait_for_step(home / "torchrun", 2, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1, "its own code"
    check_and_resume(home, start, "torchrun", "--nproc", "2")


def test_the_second_signal_ends_at_once(home: Path, start: Start):
    process = start("twice", "--nproc", "2", slow=600)
    wait_for_step(home / "twice", 1, 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert saved(home / "twice") == []


def test_a_signal_before_the_first_step_ends_at_once(home: Path, start: Start):
    process = start("early", "--nproc", "2")
    deadline = time.monotonic() + 120
    while not (home / "early" / "logs" / "rank_1.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert saved(home / "early") == []


@pytest.mark.parametrize("phase", ["checkpoint", "data"])
def test_a_hang_is_named_within_25_seconds_at_a_timeout_of_10(
    home: Path, start: Start, phase: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HANG", phase)
    monkeypatch.setenv("HANG_FILE", str(home / f"hang_{phase}"))
    process = start(
        f"hang_{phase}_run", "--nproc", "2", "rank_timeout=10", "save_interval=4", "async_save=False", slow=0
    )
    assert process.wait(300) == 3
    log = (home / f"hang_{phase}_run.log").read_text()
    step = 4 if phase == "checkpoint" else 3
    named = (home / f"hang_{phase}_run" / f"lost_rank_step_{step}.json").stat().st_mtime
    assert named - float((home / f"hang_{phase}").read_text()) < 25, log
    assert "Rank 1: lives, but does not come to where the others wait for it" in log
    assert f"Last seen: rank 1 in step {step} ({phase})" in log
