"""Seconds to save, and seconds that training is held, per GB, synchronously and beside training; and of torch.save.

The tensors are those of a model and AdamW in fp32; between two saves matrix products stand for training steps, whose
time while a checkpoint is written, over that without one, is what writing beside them costs. The first asynchronous
save takes new memory for its copies; the later ones use it again. Give a directory on the disk that is to be measured.

    python benchmarks/checkpoint.py [--gigabytes 1.0] [--saves 3] [--directory DIR]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tuner.engine.checkpoint import checkpoint_path, verify_checkpoint
from tuner.engine.host_copies import HostCopies
from tuner.engine.pending_save import PendingSave
from tuner.engine.snapshot import Snapshot
from tuner.engine.tensor_files import share_of
from tuner.engine.world import ALONE

WIDTH = 2048


def make_tensors(num_bytes: float) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and two moments of each."""
    count = max(1, round(num_bytes / (3 * 4 * WIDTH * WIDTH)))
    weights = {f"layers.{place}.weight": torch.randn(WIDTH, WIDTH) for place in range(count)}
    moments = {f"{name}.{key}": weight * 0.01 for name, weight in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    return {"model": weights, "optimizer": moments}


def train_step(square: torch.Tensor) -> float:
    """Seconds of what stands for a step."""
    started = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - started


class Save(NamedTuple):
    """What one took, in seconds."""

    held: float  # until training may go on
    seconds: float  # until it is published
    cpu: float  # of all threads while training is held
    step: float  # mean of the steps meanwhile


def measure(
    tensors: dict[str, dict[str, torch.Tensor]], work_dir: Path, num_saves: int, copies: HostCopies | None
) -> Iterator[Save]:
    """Save so many times, each time after the one before is deleted."""
    square = torch.randn(1024, 1024)
    for step in range(1, num_saves + 1):
        started, cpu = time.perf_counter(), time.process_time()
        shares = {kind: share_of(kind, named.items(), ALONE, copies) for kind, named in tensors.items()}
        facts = {"step": step, "run": "benchmark", "loss": None}
        save = PendingSave(Snapshot(step, shares, {}, facts), work_dir, ALONE, published=lambda path: None)
        if copies is None:
            save.settle()
        held, cpu = time.perf_counter() - started, time.process_time() - cpu
        steps = []
        while save.is_under_way:
            steps.append(train_step(square))
        save.settle()
        seconds = held if copies is None else held + save.seconds
        yield Save(held, seconds, cpu, statistics.mean(steps or [float("nan")]))
        shutil.rmtree(checkpoint_path(work_dir, step))


def main() -> None:
    """Print a line for each way of saving."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    tensors = make_tensors(arguments.gigabytes * 1e9)
    size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values()) / 1e9
    square = torch.randn(1024, 1024)
    alone = statistics.median(train_step(square) for _ in range(20))
    print(f"{size:.2f} GB in {sum(map(len, tensors.values()))} tensors, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        for label, copies in (("synchronous", None), ("asynchronous", HostCopies())):
            for place, save in enumerate(measure(tensors, Path(name), arguments.saves, copies), 1):
                slower = "" if copies is None else f", steps meanwhile take {save.step / alone:.2f} times as long"
                held = f"held {save.held / size:.2f} s/GB ({save.cpu / size:.2f} of CPU)"
                print(f"{label} save {place}: {save.seconds / size:.2f} s/GB, {held}{slower}", flush=True)
        started = time.perf_counter()
        with (Path(name) / "state.pth").open("wb") as file:
            torch.save(tensors, file)
            os.fsync(file.fileno())
        print(f"torch.save and fsync, without a hash: {(time.perf_counter() - started) / size:.2f} s/GB", flush=True)
        (Path(name) / "state.pth").unlink()
        next(measure(tensors, Path(name), 1, None))  # stopped before it deletes the checkpoint
        started = time.perf_counter()
        verify_checkpoint(checkpoint_path(Path(name), 1))
        print(
            f"reading all of it again, as --resume does: {(time.perf_counter() - started) / size:.2f} s/GB", flush=True
        )


if __name__ == "__main__":
    main()
