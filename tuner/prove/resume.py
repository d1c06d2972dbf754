"""`tuner check resume`: a run of the user's config that is killed again and again is the one that never was."""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from tuner.check import DATA_PARTS, check
from tuner.config import loads
from tuner.engine.checkpoint import checkpoint_path, checkpoints_directory, list_checkpoints, step_of
from tuner.engine.hooks import CheckpointHook, CurvesHook, SampleChatHook
from tuner.engine.metrics import METRICS
from tuner.engine.strategies import build_strategy
from tuner.engine.tensor_files import OPTIMIZER, WEIGHTS, TensorFiles
from tuner.errors import UserError
from tuner.parallel.mesh import arrange, read_degrees
from tuner.prove.small_model import THIN_HEAD_SIZE, Family, read_family, thin, write_model
from tuner.prove.sp import EXIT_DIFFERS

COMPARED = ("loss", "lr", "grad_norm", "num_loss_tokens", "num_tokens", "trained_tokens", "epoch")
"""what each line of metrics.jsonl says that does not depend on the clock"""
STEPS_PER_KILL = 3  # so that there is something left to do after each
POLL_SECONDS = 0.002
PATIENCE = 900  # seconds that a process may take to come to its next step
DRAFTS = ".draft_*"
NUM_SHOWN = 5


class Options(NamedTuple):
    """What the command line says."""

    kills: int = 4
    ranks: int | None = None  # processes; None is what the config's strategy needs
    kill_seed: int = 0  # of their moments


class Moment(NamedTuple):
    """When a run is killed."""

    step: int  # after so many of its own
    inside: bool  # the write of a checkpoint
    after: float  # or so much of a step later


class Trial(NamedTuple):
    """Where a killed run was."""

    went_on_from: int | None  # step of the checkpoint; None began anew
    reached: int  # the last step that it told of
    inside: bool  # a write


def check_resume(source: str, *, name: str = "config.py", **options: Any) -> int:
    """Print where the run was killed and whether it ended as the other; returns 0 where it did, 2 where not.

    The model is made thin, batches are made short, every step is saved; data, ranks, precision, optimizer and dropout
    are the config's. Each kill is a SIGKILL to all processes of `tuner train`, every other one inside a write.

    Raises:
        UserError: whatever the user can mend, as training would say it.
    """
    started, wanted = time.monotonic(), Options(**options)
    config = loads(source, name)
    check(config, DATA_PARTS)
    if wanted.kills < 1:
        raise UserError(f"--kills {wanted.kills}: give at least 1.")
    strategy = config.get("strategy") or {}
    num_ranks = choose_ranks(strategy, wanted.ranks)
    family = read_family(config)
    num_steps = STEPS_PER_KILL * wanted.kills + 1
    print(f"{name}: does a run that is killed end as one that is not?")
    print(f"  model   {describe(family)}")
    print(
        f"  run     {num_steps} steps, each saved, on {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="tuner-prove-") as directory:
        folder = Path(directory)
        model = write_model(thin(family), folder / "model")
        path = folder / "config.py"
        path.write_text(source + "\n".join(changes(config, model, family, num_steps)), encoding="utf-8")
        whole = Run(path, folder / "whole", num_ranks)
        whole.finish()
        print(f"  {time.monotonic() - started:6.1f} s  done without a stop", flush=True)
        killed = Run(path, folder / "killed", num_ranks)
        moments = random.Random(wanted.kill_seed)
        for number in range(wanted.kills):
            moment = Moment(moments.randint(1, STEPS_PER_KILL - 1), number % 2 == 0, moments.random())
            trial = killed.kill(moment)
            print(f"  {time.monotonic() - started:6.1f} s  {words(number + 1, trial)}", flush=True)
        killed.finish()
        problems = differences(whole.work_dir, killed.work_dir, num_steps)
    seconds = f"{time.monotonic() - started:.0f} s"
    if problems:
        print("\n".join(["", *problems[:NUM_SHOWN]]))
        print(f"\nNOT THE SAME in {len(problems)} places: a run that is interrupted becomes another one. {seconds}")
        return EXIT_DIFFERS
    print(f"\nThe same, bit for bit: {num_steps} steps, all weights and the optimizer's state. {seconds}")
    return 0


def choose_ranks(strategy: Mapping[str, Any], given: int | None) -> int:
    """As many processes as share a sequence; two where the strategy cuts the model."""
    degrees = read_degrees(strategy.get("sequence_parallel_size", 1))
    least = 2 if strategy.get("deepspeed") or strategy.get("fsdp") else 1
    num_ranks = given if given is not None else max(degrees.size, least)
    if num_ranks < 1:
        raise UserError(f"--ranks {num_ranks}: give at least 1, the number of processes.")
    arrange(num_ranks, degrees)
    return num_ranks


def describe(family: Family) -> str:
    """The thin model in a line."""
    return (
        f"{type(family.config).__name__} made thin: {family.num_heads} heads and {family.num_kv_heads} kv heads as in "
        f"config.json, of {THIN_HEAD_SIZE}; random weights"
    )


def changes(config: Any, model: Path, family: Family, num_steps: int) -> list[str]:
    """Lines at the end of the config's text: the small model, short batches, few steps, each of them saved."""
    llm = {"path": str(model), "weights": "random", "attention": "eager" if family.attention == "eager" else "sdpa"}
    lines = [
        "",
        "# what `tuner check resume` changes",
        "from tuner.prove.short_batches import ShortBatches",
        f"model['llm'].update({llm!r})",
        "train_dataloader['dataset'] = dict(type=ShortBatches, dataset=train_dataloader['dataset'])",
        f"train_dataloader['max_steps'] = {num_steps}",
    ]
    if config.train_dataloader.get("num_epochs") is not None:
        lines.append("train_dataloader['num_epochs'] = 1_000_000")  # there are as many steps, however little data
    hooks = []
    for place, hook in enumerate(config.get("custom_hooks", [])):
        if hook["type"] is CheckpointHook:
            hooks.append(f"{{**custom_hooks[{place}], 'interval': 1, 'keep': 2, 'copy_to': None}}")
        elif hook["type"] not in (SampleChatHook, CurvesHook):
            hooks.append(f"custom_hooks[{place}]")
    if config.strategy["type"] is build_strategy and config.strategy.get("offload_directory"):
        lines.append(f"strategy['offload_directory'] = {str(model.parent / 'offload')!r}")
    return [*lines, f"custom_hooks = [{', '.join(hooks)}]", ""]


class Run:
    """`tuner train` in a work dir, as often as it is started."""

    def __init__(self, config: Path, work_dir: Path, num_ranks: int) -> None:
        self.work_dir = work_dir
        self._log = work_dir.with_suffix(".log")
        ranks = () if num_ranks == 1 else ("--nproc", str(num_ranks))
        self._command = [sys.executable, "-m", "tuner", "train", str(config), "--work-dir", str(work_dir), *ranks]

    def finish(self) -> None:
        """Train to the end. Raises UserError with what the run said where it fails."""
        process, _ = self._start()
        if process.wait() != 0:
            raise self._failure()

    def kill(self, moment: Moment) -> Trial:
        """Train on, and kill it at the moment."""
        started = time.time()
        process, resumed = self._start()
        members: list[psutil.Process] = []
        try:
            self._wait(process, lambda: self._reached(started) >= (resumed or 0) + moment.step)
            self._wait(process, lambda: self._newest() > (resumed or 0))  # else all kills could end the same stretch
            members = members_of(process)  # now: looking for them takes longer than a small write
            if moment.inside:
                self._wait(process, self._is_writing)
            else:
                time.sleep(moment.after * self._step_seconds())
        finally:
            kill_all(process, members)
        return Trial(resumed, self._reached(), self._is_writing())

    def _start(self) -> tuple[subprocess.Popen[bytes], int | None]:
        newest = self._newest()
        command = [*self._command, *(["--resume"] if newest else [])]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return process, newest or None

    def _newest(self) -> int:
        return max(map(step_of, list_checkpoints(self.work_dir)), default=0)

    def _wait(self, process: "subprocess.Popen[bytes]", is_so: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if process.poll() is not None:
                raise self._failure()
            if time.monotonic() > deadline:
                raise UserError(f"the run came to no next step in {PATIENCE} seconds:\n{self._last_words()}")
            time.sleep(POLL_SECONDS)

    def _is_writing(self) -> bool:
        return any(checkpoints_directory(self.work_dir).glob(DRAFTS))

    def _reached(self, since: float = 0) -> int:
        """The last step of which there is a line; 0 where none is newer than `since`, in seconds since the epoch."""
        path = self.work_dir / METRICS
        is_new = path.exists() and path.stat().st_mtime > since  # an old one has lines that are computed again
        return max(read_metrics(self.work_dir), default=0) if is_new else 0

    def _step_seconds(self) -> float:
        rows = read_metrics(self.work_dir)
        return rows[max(rows)]["step_seconds"] if rows else 0.0

    def _failure(self) -> UserError:
        return UserError(f"the run ended before its time. The last it said:\n{self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_SHOWN:])


def members_of(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """A process and all that it has started: the launcher, ranks and their data workers."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def kill_all(process: "subprocess.Popen[bytes]", members: list[psutil.Process]) -> None:
    """SIGKILL to those that were found, and to whatever else there is by now."""
    for found in (lambda: members, lambda: members_of(process)):
        for member in found():
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()
    psutil.wait_procs([member for member in members if member.pid != process.pid], timeout=PATIENCE)


def words(number: int, trial: Trial) -> str:
    """A kill in a line."""
    begun = "from the beginning" if trial.went_on_from is None else f"from step {trial.went_on_from}"
    where = "inside a write" if trial.inside else "between writes"
    return f"kill {number}: it had gone on {begun}, was past step {trial.reached} and {where}"


def read_metrics(work_dir: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl by step; one that is not whole is left out."""
    path = work_dir / METRICS
    rows = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        rows[row["step"]] = row
    return rows


def differences(expected: Path, found: Path, num_steps: int) -> list[str]:
    """In words: what two work dirs do not have in common, in the lines of their steps and in their last tensors."""
    problems, rows, other_rows = [], read_metrics(expected), read_metrics(found)
    for step in range(1, num_steps + 1):
        row, other = rows.get(step, {}), other_rows.get(step, {})
        problems += [
            f"step {step}: {name} is {other.get(name)!r}, without a kill {row.get(name)!r}"
            for name in COMPARED
            if name not in row or row[name] != other.get(name)
        ]
    for kind in (WEIGHTS, OPTIMIZER):
        tensors, others = (TensorFiles(checkpoint_path(run, num_steps), kind) for run in (expected, found))
        if set(tensors) != set(others):
            problems.append(f"the last checkpoints have other {kind} tensors")
        problems += [f"{kind} {name} differs" for name in tensors if not is_same(tensors[name], others.get(name))]
    return problems


def is_same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two tensors have the same bits: NaN equals NaN, and 0 not -0."""
    if other is None or other.dtype != tensor.dtype or other.shape != tensor.shape:
        return False
    return torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
