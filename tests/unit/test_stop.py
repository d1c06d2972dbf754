"""A run that is asked to end after a step saves that step once, and goes on as if nobody had asked."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_training import make_runner
from test_bad_steps import assert_equal, rows, tensors

from tuner.engine import stop
from tuner.engine.checkpoint import checkpoint_path, list_checkpoints
from tuner.engine.frame import Hook
from tuner.engine.hooks import CheckpointHook, CurvesHook, MetricsHook
from tuner.engine.runner import Runner
from tuner.engine.stop import BY_FILE, Stop
from tuner.engine.world import ALONE, World
from tuner.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After a run that was stopped they are without effect, which the rest of the tests shall not be."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Ask(Hook):
    """Sends a signal to this process, or makes the file, once a step is done."""

    priority = "VERY_HIGH"

    def __init__(self, step: int, number: int | None) -> None:
        self.step, self.number = step, number

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        if runner.strategy.step != self.step:
            return
        if self.number is None:
            (Path(runner.work_dir) / "stop").touch()
        else:
            os.kill(os.getpid(), self.number)
            while not runner.train_loop.stop.asked():
                time.sleep(0.01)


def stopped(work_dir: Path, step: int, number: int | None, saves: CheckpointHook) -> Runner:
    runner = make_runner(work_dir, hooks=[MetricsHook(interval=9), saves, Ask(step, number)], attention_dropout=0.3)
    runner.train()
    return runner


def traces(work_dir: Path) -> list[tuple]:
    return [
        tuple(row[name] for name in ("step", "loss", "grad_norm", "lr", "trained_tokens")) for row in rows(work_dir)
    ]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, capsys, is_async):
    hooks = [MetricsHook(interval=9), CheckpointHook(interval=None)]
    make_runner(tmp_path / "straight", hooks=hooks, attention_dropout=0.3).train()
    for number, step in ((signal.SIGUSR1, 2), (None, 3)):
        work_dir = tmp_path / str(number)
        saves = CheckpointHook(interval=None if number else 1, async_save=is_async)
        runner = stopped(work_dir, step, number, saves)
        who = f"{work_dir}/stop" if number is None else "SIGUSR1"
        assert runner.train_loop.stopped_by == f"by {who}"
        assert f"stopped by {who} after step {step + 1} of 6, which is saved" in capsys.readouterr().out
        assert list_checkpoints(work_dir)[-1].name == f"step_0000000{step + 1}"
        assert not (work_dir / "stop").exists()
        checkpoint = checkpoint_path(work_dir, step + 1)
        make_runner(work_dir, hooks=hooks, checkpoint=checkpoint, attention_dropout=0.3).train()
        assert traces(work_dir) == traces(tmp_path / "straight")
        assert_equal(tensors(work_dir), tensors(tmp_path / "straight"))


def test_a_step_that_is_saved_already_is_not_saved_twice_and_one_that_failed_is(tmp_path, monkeypatch):
    saves = CheckpointHook(interval=3)
    saved = []
    save = saves.save
    saves.save = lambda runner, **keywords: (saved.append((runner.strategy.step, keywords)), save(runner, **keywords))
    stopped(tmp_path / "same", 2, signal.SIGTERM, saves)
    assert saved == [(3, {"is_last": False})]

    failing = CheckpointHook(interval=3)
    take = failing._begin

    def fail_once(runner: Runner, is_last: bool) -> None:
        if is_last:
            take(runner, is_last)
        else:
            failing._fail(runner, runner.strategy.step, OSError("full"), is_last)

    monkeypatch.setattr(failing, "_begin", fail_once)
    stopped(tmp_path / "failed", 2, signal.SIGTERM, failing)
    assert [path.name for path in list_checkpoints(tmp_path / "failed")] == ["step_00000003"]


def test_a_stop_that_cannot_save_is_an_error(tmp_path, monkeypatch):
    saves = CheckpointHook(interval=None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.engine.pending_save.begin_draft", full)
    with pytest.raises(UserError, match=r"step 3 could not be written: .*No space left"):
        stopped(tmp_path, 2, signal.SIGTERM, saves)


def test_a_run_whose_last_step_is_done_is_not_stopped(tmp_path):
    runner = stopped(tmp_path, 5, signal.SIGTERM, CheckpointHook(interval=None))
    assert runner.train_loop.stopped_by == ""
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_curves_are_drawn_of_a_stopped_run(tmp_path):
    hooks = [MetricsHook(), CheckpointHook(interval=None), Ask(1, signal.SIGTERM), CurvesHook()]
    make_runner(tmp_path, hooks=hooks).train()
    assert (tmp_path / "curves.png").exists()


def test_the_second_signal_ends_at_once_but_not_the_first_ones_echo(tmp_path, monkeypatch, capsys):
    codes: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    wish = Stop(tmp_path, ALONE)
    assert wish.asked() == 0
    wish._take(signal.SIGTERM)
    wish._take(signal.SIGTERM)
    assert (codes, wish.asked()) == ([], signal.SIGTERM)
    wish._seconds -= 2 * stop.SAME_SECONDS
    wish._take(signal.SIGINT)
    assert codes == [130]
    assert "SIGINT again: ended at once" in capsys.readouterr().err


def test_signals_are_taken_while_the_main_thread_does_not_return(tmp_path):
    """By a thread: in a collective the main one would not run a handler before the others have come."""
    wish, seen = Stop(tmp_path, ALONE), []
    reader, writer = socket.socketpair()

    def look() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not wish._number and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(wish.asked())
        writer.send(b"x")

    with wish.heeded():
        threading.Thread(target=look).start()
        reader.recv(1)
    assert seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "what a launcher passes on late does no harm"


def test_the_end_does_not_wait_for_children_that_hold_the_sockets_open(tmp_path):
    with Stop(tmp_path, ALONE).heeded():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        listener = next(thread for thread in threading.enumerate() if thread.name == "stop")
        ender = threading.Timer(20, os.kill, (child, signal.SIGKILL))
        ender.start()
    assert not listener.is_alive()
    assert ender.is_alive(), "it ended with the child"
    ender.cancel()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_only_the_first_rank_looks_for_the_file_and_nohup_holds(tmp_path):
    (tmp_path / "stop").touch()
    assert Stop(tmp_path, World(0, 2)).asked() == BY_FILE
    assert Stop(tmp_path, World(1, 2)).asked() == 0
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop(tmp_path, ALONE).heeded():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop.do_nothing
    assert signal.getsignal(signal.SIGTERM) != stop.do_nothing
