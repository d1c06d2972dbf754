"""Ranks are started, watched and ended together; on stand-ins that train nothing and say what they are told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner.errors import UserError
from tuner.failures import Failure, is_echo
from tuner.launch import slurm
from tuner.launch.command import check_gpus, check_size, enter_step
from tuner.launch.launcher import Run, cause, launch
from tuner.launch.options import Node, Options, is_rank_of_another, read_master, read_node

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
from tuner.errors import UserError
from tuner.failures import exit_code, tell
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def fail(error):
    try:
        raise error
    except Exception as raised:
        tell(raised, debug=False)
        sys.exit(exit_code(raised))
def stay():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
directory = Path(os.environ["TUNER_LAUNCH_DIR"])
(directory / f"imported_{rank}").touch()
while len(list(directory.glob("imported_*"))) < int(os.environ["LOCAL_WORLD_SIZE"]):
    time.sleep(0.01)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., int]:
    """Launch ranks that run these lines; the exit code of the command."""

    def run_all(lines: str, *, node: Node = Node(2), **options: Any) -> int:  # noqa: B008
        script = tmp_path / "rank.py"
        script.write_text(PRELUDE + lines, encoding="utf-8")
        run = Run("", tmp_path / "work", None, [sys.executable, str(script)])
        return launch(run, node, Options(**options))

    return run_all


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_all_succeed_and_only_the_first_speaks(start: Callable, tmp_path: Path, capfd: pytest.CaptureFixture):
    assert start("print('I am', rank, 'of', os.environ['WORLD_SIZE'])\n") == 0
    assert capfd.readouterr() == ("I am 0 of 2\n", "")
    assert (tmp_path / "work" / "logs" / "rank_1.log").read_text() == "I am 1 of 2\n"


def test_one_failure_ends_all_and_is_told_alone(start: Callable, capfd: pytest.CaptureFixture):
    lines = """
if rank == 1:
    time.sleep(0.3)
    fail(UserError("row 7 is bad."))
for number in (signal.SIGTERM, signal.SIGINT):  # which ask a rank that trains to save; here it waits in a collective
    signal.signal(number, lambda *_: os.write(2, b"ended after this step"))
while True:
    stay()
"""
    started = time.monotonic()
    assert start(lines) == 2
    assert time.monotonic() - started < 20
    assert capfd.readouterr() == ("", "Error: row 7 is bad.\n")


def test_the_cause_is_told_and_not_the_echo_that_came_first(start: Callable, capfd: pytest.CaptureFixture):
    lines = """
if rank == 0:
    fail(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:8080"))
time.sleep(1)
fail(ZeroDivisionError("by nought"))
"""
    assert start(lines) == 1
    message = capfd.readouterr().err
    assert message.startswith("rank 1: ZeroDivisionError: by nought (run with --debug for the traceback)\n")
    assert "rank_1.log" in message
    assert "gloo" not in message


def test_what_all_ranks_find_is_told_once(start: Callable, capfd: pytest.CaptureFixture):
    assert start("fail(UserError('sp does not divide the heads.'))\n") == 2
    assert capfd.readouterr().err == "Error: sp does not divide the heads.\n"


def test_a_rank_that_is_killed_is_named(start: Callable, capfd: pytest.CaptureFixture):
    lines = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else stay()\n"
    assert start(lines) == 128 + signal.SIGKILL
    assert capfd.readouterr().err.startswith("rank 1: killed (SIGKILL), most often by the system for lack of memory")


def test_75_survives(start: Callable):
    assert start("sys.exit(75)\n") == 75


@pytest.mark.parametrize(
    ("number", "handled", "code"),
    [(signal.SIGTERM, True, 75), (signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGHUP, True, 75)],
    ids=["saved", "ended", "ctrl-c", "terminal-closed"],
)
def test_a_signal_reaches_all_ranks(start: Callable, tmp_path: Path, number: int, handled: bool, code: int):
    lines = f"""
got = Path({str(tmp_path)!r}) / f"got_{{rank}}"
def save(*_):
    time.sleep(0.5)
    got.touch()
    sys.exit(75)
if {handled}:
    signal.signal(signal.SIGTERM, save)
(Path({str(tmp_path)!r}) / f"ready_{{rank}}").touch()
stay()
"""

    def send() -> None:
        while len(list(tmp_path.glob("ready_*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert start(lines) == code
    sender.join()
    assert len(list(tmp_path.glob("got_*"))) == (2 if handled else 0)


def test_a_rank_that_does_not_leave_in_its_grace_is_killed(start: Callable, tmp_path: Path):
    lines = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(Path({str(tmp_path)!r}) / f"ready_{{rank}}").touch()
if rank == 0:
    while len(list(Path({str(tmp_path)!r}).glob("ready_*"))) < 2:
        time.sleep(0.02)
    os.kill(os.getppid(), signal.SIGTERM)
stay()
"""
    assert start(lines, grace=0.5) == 143


def test_a_failure_is_worth_a_restart_and_a_mistake_is_not(start: Callable, capfd: pytest.CaptureFixture):
    assert start("fail(RuntimeError('once')) if attempt == 0 and rank == 1 else None\n", max_restarts=2) == 0
    assert "all ranks are started again (1 of 2 restarts)" in capfd.readouterr().err
    assert start("fail(UserError(f'mend me, {attempt}'))\n", max_restarts=2) == 2
    assert capfd.readouterr().err == "Error: mend me, 0\n"
    assert start("fail(RuntimeError(f'attempt {attempt}')) if rank == 0 else stay()\n", max_restarts=1) == 1
    assert "attempt 1" in capfd.readouterr().err


def test_a_restart_goes_on_from_the_newest_checkpoint(start: Callable, tmp_path: Path):
    (tmp_path / "work" / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "work" / "checkpoints" / "step_00000003" / "manifest.json").write_text("{}")
    lines = f"""
told = json.loads((directory / "run.json").read_text())
(Path({str(tmp_path)!r}) / f"resume_{{attempt}}").write_text(str(told["resume"]))
if attempt == 0:
    fail(RuntimeError("once"))
"""
    assert start(lines, node=Node(1), max_restarts=1) == 0
    assert [(tmp_path / f"resume_{attempt}").read_text() for attempt in (0, 1)] == ["None", "auto"]


def test_ranks_leave_when_their_launcher_is_killed(tmp_path: Path):
    rank = tmp_path / "rank.py"
    lines = """
from tuner.launch.rank import leave_with, read_run
leave_with(read_run().launcher)
"""
    rank.write_text(PRELUDE + lines + f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\nstay()\n")
    code = f"""
import sys
from pathlib import Path
from tuner.launch.launcher import Run, launch
from tuner.launch.options import Node, Options
launch(Run("", Path({str(tmp_path)!r}), None, [sys.executable, {str(rank)!r}]), Node(1), Options())
"""
    launcher = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
        assert launcher.poll() is None
    launcher.kill()
    launcher.wait()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, "the rank stayed"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended without anybody having asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    def write(lines: str) -> tuple[Path, str]:
        path = tmp_path / "rank.py"
        path.write_text(PRELUDE + lines, encoding="utf-8")
        return tmp_path / "work", str(path)

    return write


def two_nodes(script: Callable, lines: str, **options: Any) -> list[Any]:
    """Launch the same on two nodes of one process each; exit code and messages of each launcher."""
    port = free_port()
    code = f"""
import sys
from pathlib import Path
from tuner.errors import UserError
from tuner.launch.launcher import Run, launch
from tuner.launch.options import Node, Options
rank, work, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
try:
    run, node = Run("", work, None, [sys.executable, script]), Node(1, rank, 2, "127.0.0.1", {port})
    sys.exit(launch(run, node, Options(**{options!r})))
except UserError as error:
    sys.exit(f"Error: {{error}}")
"""
    work, path = script(lines)
    nodes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(work), path], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, errors)]


def test_nodes_meet_and_a_failure_on_one_ends_both(script: Callable):
    lines = """
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == "0"
if attempt == 1:
    sys.exit(0)
fail(OSError("no such disk")) if rank == 1 else stay()
"""
    (code, told), (code_there, told_there) = two_nodes(script, lines, max_restarts=1)
    assert (code, code_there) == (0, 0)
    for text in (told, told_there):
        assert text.startswith(f"rank 1 on {socket.gethostname()}: OSError: no such disk")
        assert "started again (1 of 1 restarts)" in text
        assert "recvValue" not in text, "no node leaves before the others know"


def test_a_node_that_never_comes(start: Callable, capfd: pytest.CaptureFixture):
    node = Node(1, 0, 3, "127.0.0.1", free_port())
    with pytest.raises(UserError, match=r"1 of 3 nodes came within 1 s: 0 \(.*\)\. Missing: 1, 2\..*--node-timeout"):
        start("", node=node, node_timeout=1)
    with pytest.raises(UserError, match=r"node 0 did not answer at 127.0.0.1:.* within 1 s \(Connection refused\)"):
        start("", node=Node(1, 1, 2, "127.0.0.1", free_port()), node_timeout=1)
    assert capfd.readouterr() == ("", ""), "no trace of torch's"


def test_too_many_ranks_are_told_when_the_nodes_have_met(tmp_path: Path):
    check = partial(check_size, {"sequence_parallel_size": {"ulysses": 2, "ring": 2}, "deepspeed": None}, 3)
    run = Run("", tmp_path, None, [sys.executable, "-c", "raise SystemExit(9)"], check_size=check)
    with pytest.raises(UserError, match=r"4 ranks \(ulysses=2, ring=2\) does not fit 3 ranks.* Sizes that do: 1, 3"):
        launch(run, Node(3), Options())
    with pytest.raises(
        UserError, match=r"zero_hpz_partition_size 3 does not divide the 8 .* Sizes that do: 1, 2, 4, 8"
    ):
        check_size({"deepspeed": "zero3_hpz", "hpz_partition_size": 3}, 4, 8)
    check_size({"sequence_parallel_size": 4, "deepspeed": "zero3_hpz"}, 4, 8)


def test_a_port_in_use_is_named(start: Callable):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for number in (1, 2):
            with pytest.raises(UserError, match=f"Port {port} on 127.0.0.1 cannot be opened: most often another run"):
                start("", node=Node(1, 0, number, "127.0.0.1", port))


def failure(rank: int, seconds: float, *, echo: bool = False) -> Failure:
    return Failure(rank, "host", seconds, 1, "", is_echo=echo)


def test_an_echo_waits_for_its_cause():
    echo, late = failure(0, 100.0, echo=True), failure(1, 101.0)
    assert cause([], 100.0) is None
    assert cause([echo], 101.0) is None
    assert cause([echo, late], 101.0) == late
    assert cause([echo], 104.0) == echo


def test_only_lost_connections_are_echoes():
    assert is_echo(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_echo(RuntimeError("CUDA out of memory"))
    assert not is_echo(UserError("Connection reset by the hub."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nproc": 0}, "--nproc 0: give 1 or more"),
        ({"nproc": 2, "max_restarts": -1}, "--max-restarts -1: give 0 or more"),
        ({"nproc": 2, "nnodes": 2}, "--nnodes 2 needs --node-rank, --master too"),
        ({"nproc": 2, "nnodes": 2, "node_rank": 2, "master": "a"}, "--node-rank 2: 2 nodes are counted from 0 to 1"),
        ({"nproc": 2, "node_rank": 1}, "--node-rank 1 needs --nnodes"),
        ({"nproc": 2, "master": "host:port"}, "--master host:port: expected HOST or HOST:PORT"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_node(Options(**options))


def test_each_process_needs_a_gpu_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2, SimpleNamespace(strategy={}))
    check_gpus(3, SimpleNamespace(strategy={"device": "cpu"}))
    with pytest.raises(UserError, match=r"--nproc 3: this node has 2 GPUs, .* Give --nproc 2"):
        check_gpus(3, SimpleNamespace(strategy={}))


def test_where_the_first_node_is():
    assert read_master("node-a") == ("node-a", 29400)
    assert read_master("10.0.0.1:7") == ("10.0.0.1", 7)
    assert read_master("[fe80::1]:7") == ("fe80::1", 7)
    assert read_master("fe80::1") == ("fe80::1", 29400)


def test_options_and_variables_do_not_both_count_processes():
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert is_rank_of_another(Options(), variables)
    assert not is_rank_of_another(Options(), {})
    with pytest.raises(UserError, match=r"but RANK=0, WORLD_SIZE=2, .* say that this is one already"):
        is_rank_of_another(Options(nproc=2), variables)


STEP = {
    **{"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "11"},
    **{"SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
    "SLURM_STEP_NODELIST": "gpu-[03-04]",
}


def test_slurms_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "restored at the end")
    assert is_rank_of_another(enter_step(Options(launcher="slurm")))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["11", "16", "3", "8", "gpu-03", "23456"]


def test_slurms_task_on_a_node_starts_its_processes():
    variables = {**STEP, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    options = slurm.node_options(Options(launcher="slurm", nproc=8, nnodes=2), slurm.read_step(variables))
    assert read_node(options) == Node(8, 1, 2, "gpu-03", 23456)
    with pytest.raises(UserError, match="srun has started 8 tasks on this one"):
        slurm.node_options(Options(launcher="slurm", nproc=8), slurm.read_step(STEP))
    with pytest.raises(UserError, match="contradict each other"):
        slurm.read_step({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8"})
    with pytest.raises(UserError, match="srun has not set SLURM_PROCID"):
        slurm.read_step({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})


def test_a_batch_script_and_an_interactive_shell_are_no_steps():
    assert slurm.is_in_step(STEP)
    assert not slurm.is_in_step({**STEP, "SLURM_STEP_ID": "4294967290"})
    assert not slurm.is_in_step({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu-[03-06,09]", "gpu-03"), ("a,b", "a"), ("rack[1-2]n[01,04]-ib,x", "rack1n01-ib"), ("alone", "alone")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str):
    assert slurm.first_host(nodes) == first


def test_the_batch_script_runs_the_same_command(tmp_path: Path):
    arguments = ["train", "my config.py", "--nproc", "8", "--nnodes=2", "--launcher", "slurm", "--sbatch", "x.sh"]
    text = slurm.script(Options(launcher="slurm", nproc=8, nnodes=2), arguments, "my config")
    path = tmp_path / "job.sh"
    path.write_text(text, encoding="utf-8")
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "#SBATCH --nodes=2\n" in text
    assert f"{sys.executable} -m tuner train 'my config.py' --nproc 8 --nnodes=2 --launcher slurm\n" in text


def test_a_failure_is_kept_as_the_first_word_of_a_rank(tmp_path: Path):
    from tuner.failures import note

    environment = {"TUNER_LAUNCH_DIR": str(tmp_path), "RANK": "3"}
    assert not note(UserError("first"), environment)
    assert not note(RuntimeError("what followed"), environment)
    assert json.loads((tmp_path / "failure_3.json").read_text())["message"] == "Error: first"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
