"""Numbers of every step: to the terminal, to metrics.jsonl and to TensorBoard."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from tuner.engine.checkpoint import write_text_atomically
from tuner.engine.frame import Hook
from tuner.engine.machine import PeakRate, peak_memory, peak_rate
from tuner.engine.strategy import Skip, StepResult
from tuner.engine.tally import Tally
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.model.checkpointing import choice_of
from tuner.model.flops import Matmuls, count_matmuls, hardware_flops, model_flops

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

METRICS = "metrics.jsonl"
CHARTED = (
    *("loss", "lr", "grad_norm", "tokens_per_second", "tokens_per_second_per_device", "mfu", "hfu"),
    *("memory_bytes", "imbalance", "data_seconds", "wait_seconds", "least_wait_seconds"),
)
SKIPS: dict[Skip, str] = {
    "overflow": "gradient overflow: step skipped, loss scale halved",
    "nonfinite": "loss or gradient not finite: step skipped, documents in nonfinite_step_N.json",
    "spike": "loss spike: step skipped, documents in nonfinite_step_N.json",
    "stepped over": "stepped over after going back",
}
RANK_COLUMNS = (
    "over ranks: data = longest wait for data; waits = mean time since the sums of the step before in which a thread "
    "that trains computed nothing (others were slower, or their tensors under way, or another process had its core), "
    "in brackets that of the busiest rank, '-' on GPUs, where no clock tells; imbalance = largest sum of squared "
    "document lengths / mean"
)


class MetricsHook(Hook):
    """A line per step in metrics.jsonl, TensorBoard scalars, and a readable line every `interval` steps."""

    def __init__(self, *, interval: int = 10) -> None:
        if interval < 1:
            raise UserError(f"log_interval={interval}: choose 1 or more steps between log lines.")
        self.interval = interval

    def before_train(self, runner: "Runner") -> None:
        """Open the files, cutting off what a lost stretch of an earlier run left beyond the resumed step."""
        self.writes = runner.strategy.world.is_first
        if not self.writes:
            return
        work_dir = Path(runner.work_dir)
        step = runner.strategy.step
        self.peak = peak_rate(runner.strategy.device)
        llm = runner.model.get_submodule("llm")
        self.matmuls, self.checkpointing = read_matmuls(llm), choice_of(llm)
        self._open(work_dir, step)
        print(header(runner, self.peak), flush=True)

    def after_rollback(self, runner: "Runner") -> None:
        """Forget the steps since the checkpoint: they come again."""
        if self.writes:
            self.after_run(runner)
            self._open(Path(runner.work_dir), runner.strategy.step)

    def _open(self, work_dir: Path, step: int) -> None:
        keep_lines(work_dir / METRICS, step)
        self.file = (work_dir / METRICS).open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(work_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self.first_step, self.started = step, time.perf_counter()

    def after_train_iter(
        self, runner: "Runner", batch_idx: int, data_batch: Sequence[Any], outputs: StepResult
    ) -> None:
        """Write what the step did."""
        if not self.writes:
            return
        figures = {name: finite(value) for name, value in runner.figures.items()}
        runner.figures.clear()
        row = {**self._row(runner, outputs), **figures}
        self.file.write(json.dumps(row) + "\n")
        for name in (*CHARTED, *figures):
            if row[name] is not None:
                self.board.add_scalar(name, row[name], row["step"])
        is_last = row["step"] == row["num_steps"]
        if row["step"] % self.interval == 0 or row["step"] == self.first_step + 1 or is_last or row["skipped"]:
            print(line(row, runner.strategy.world.size), flush=True)

    def after_run(self, runner: "Runner") -> None:
        """Close the files."""
        if not self.writes:
            return
        self.file.close()
        self.board.close()

    def _row(self, runner: "Runner", result: StepResult) -> dict[str, Any]:
        loop, strategy = runner.train_loop, runner.strategy
        done, num_steps = strategy.step, loop.num_steps
        seconds_per_step = (time.perf_counter() - self.started) / (done - self.first_step)
        mfu, hfu = self._utilisation(result, loop.step_seconds * strategy.world.size)
        return {
            "step": done,
            "num_steps": num_steps,
            "epoch": loop.epoch,
            **loop.stage_columns(),
            "loss": finite(result.loss),
            "lr": result.lr,
            "grad_norm": finite(result.grad_norm),
            "skipped": result.skip or None,
            "num_tokens": result.num_tokens,
            "num_loss_tokens": result.num_loss_tokens,
            "trained_tokens": loop.num_loss_tokens,
            "tokens_per_second": result.num_tokens / loop.step_seconds,
            "tokens_per_second_per_device": result.num_tokens / loop.step_seconds / strategy.world.size,
            "mfu": mfu,
            "hfu": hfu,
            **over_ranks(result.tally, strategy.world, strategy.device),
            "step_seconds": loop.step_seconds,
            "save_seconds": strategy.progress.take_save_seconds(),
            "seconds_left": seconds_per_step * (num_steps - done),
        }

    def _utilisation(self, result: StepResult, seconds: float) -> tuple[float | None, float | None]:
        """MFU and HFU of a step that took so many seconds of all devices together."""
        if self.matmuls is None:
            return None, None
        counts = (self.matmuls, result.num_tokens, result.sum_squared_lengths, result.num_loss_tokens)
        hardware = hardware_flops(*counts, gradient_checkpointing=self.checkpointing)
        return model_flops(*counts) / seconds / self.peak.flops, hardware / seconds / self.peak.flops


def over_ranks(tally: Tally, world: World, device: torch.device) -> dict[str, Any]:
    """What is compared between ranks; times of waiting are None where nobody waits, or where nobody can tell."""
    own = peak_memory(device)  # later than the tally's: the optimizer's state may have come since
    is_known = world.size > 1 and device.type == "cpu"
    return {
        "memory_bytes": max(tally.memory_bytes, own),
        "memory_rank": world.rank if own > tally.memory_bytes else tally.memory_rank,
        "imbalance": tally.imbalance,
        "data_seconds": tally.data_seconds,
        "wait_seconds": tally.wait_seconds if is_known else None,
        "least_wait_seconds": tally.least_wait_seconds if is_known else None,
    }


def read_matmuls(llm: PreTrainedModel) -> Matmuls | None:
    """The model's matrix products; None, and a line that says so, where the cost of a layer is not known."""
    try:
        return count_matmuls(llm)
    except UserError as error:
        print(f"warning: {error}", flush=True)
        return None


def header(runner: "Runner", peak: PeakRate) -> str:
    """What the columns of the log mean; printed once."""
    loop, num_devices = runner.train_loop, runner.strategy.world.size
    peaks = "peak" if num_devices == 1 else f"peak x {num_devices} devices"
    return (
        f"{loop.num_steps} optimizer steps in {runner.work_dir}, from step {runner.strategy.step}\n"
        f"MFU = FLOPs of forward and backward / (seconds of the step x {peaks}); FLOPs = 6 x weights of the layers x "
        "tokens + 6 x weights of the head x trained tokens (4 x those that are frozen) + 6 x heads x head size x sum "
        "of squared document lengths, over all layers (causal, GQA-aware); HFU adds what is computed again: scores, "
        "checkpointed layers\n"
        f"peak = {peak.flops / 1e12:.3g} TFLOP/s, {peak.source}; tok/s counts every token, waiting for data included"
        + ("" if num_devices == 1 else f"\n{RANK_COLUMNS}")
    )


def line(row: dict[str, Any], num_ranks: int) -> str:
    """One step for a person."""
    parts = [
        f"step {row['step']}/{row['num_steps']}",
        f"epoch {row['epoch'] + 1}",
        "loss -" if row["loss"] is None else f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        "grad norm -" if row["grad_norm"] is None else f"grad norm {row['grad_norm']:.3g}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"trained {short(row['trained_tokens'])}",
        f"MFU {share(row['mfu'])}",
        f"HFU {share(row['hfu'])}",
        f"{row['memory_bytes'] / 1e9:.2f} GB",
        *(rank_columns(row) if num_ranks > 1 else ()),
        f"left {duration(row['seconds_left'])}",
    ]
    return "  ".join(parts) + (f"  ({SKIPS[row['skipped']]})" if row["skipped"] else "")


def rank_columns(row: dict[str, Any]) -> list[str]:
    """How the ranks of a step fared beside each other."""
    waits, least = (
        "-" if row[name] is None else f"{row[name]:.2f} s" for name in ("wait_seconds", "least_wait_seconds")
    )
    return [
        f"(rank {row['memory_rank']})",
        f"data {row['data_seconds']:.2f} s",
        f"waits {waits} ({least})",
        f"imbalance {row['imbalance']:.2f}",
    ]


def finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None


def share(value: float | None) -> str:
    """0.4123 -> 41.2%; a dash for what is not known."""
    return "-" if value is None else f"{value:.1%}"


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 3725 -> 1:02:05."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def keep_lines(path: Path, step: int) -> None:
    """Keep the lines of a JSONL file up to `step`: those after it are computed again, a torn one is a kill's."""
    if path.exists():
        kept = [text for text in path.read_text(encoding="utf-8").splitlines() if is_up_to(text, step)]
        write_text_atomically(path, "".join(f"{text}\n" for text in kept))


def is_up_to(text: str, step: int) -> bool:
    """Whether a line is whole and of a step that is not computed again."""
    try:
        return json.loads(text)["step"] <= step
    except ValueError:
        return False
