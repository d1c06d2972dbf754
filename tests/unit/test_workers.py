"""Worker processes: results in order, errors told, nobody left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tuner.dataset.workers import WINDOW, Workers
from tuner.errors import UserError


def square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    return number * number


def refuse(number: int) -> int:
    if number == 5:
        raise UserError("five is not allowed")
    return number


def divide(number: int) -> float:
    return 1 / number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_come_in_order_and_workers_serve_again(num_workers):
    with Workers(square, num_workers=num_workers) as workers:
        assert list(workers.map(range(40))) == [number * number for number in range(40)]
        assert list(workers.map([])) == []
        assert list(workers.map(range(3))) == [0, 1, 4]


def test_no_more_items_are_taken_than_the_window_holds():
    taken = []
    with Workers(square, num_workers=2) as workers:
        results = workers.map(taken.append(number) or number for number in range(1000))
        for given, _ in zip(range(20), results):
            assert len(taken) <= given + 1 + 2 * WINDOW


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (refuse, UserError, "five"),
        (divide, RuntimeError, r"^ZeroDivisionError: division by zero \(in a worker process\)\nTraceback"),
        (die, UserError, r"ended early.*-9"),
    ],
)
def test_errors_and_deaths_are_told(function, error, message):
    with pytest.raises(error, match=message), Workers(function, num_workers=2) as workers:
        list(workers.map(range(10)))


ORPHANS = """
import os, sys, time
from tuner.dataset.workers import Workers
if __name__ == "__main__":
    with Workers(abs, num_workers=2) as workers:
        print(list(workers.map(range(4))), *(process.pid for process in workers._processes), flush=True)
        time.sleep(60)
"""


UNGUARDED = """
from functools import partial
from tuner.dataset.workers import Workers
def work(data, number):
    return number
with Workers(partial(work, bytes(1 << 20)), num_workers=2) as workers:
    print(list(workers.map(range(4))))
"""


def test_a_script_that_workers_cannot_import_is_told_so_however_much_they_would_get(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "A worker process ended early (exit codes [1])" in done.stderr


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.3])
def test_ctrl_c_is_for_the_parent_alone_from_the_beginning(tmp_path, seconds):
    """A terminal sends it to all processes, also to those that still import what they need."""
    (tmp_path / "script.py").write_text(ORPHANS.replace("    with", "    print(flush=True)\n    with"))
    command = [sys.executable, tmp_path / "script.py"]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    time.sleep(seconds)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=20)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1, errors


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().rsplit("]", 1)[1].split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def runs(pid: int) -> bool:
    """Whether a process is alive, and not merely waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
