"""What every way of holding a model has in common: the optimizer step over micro-batches and over ranks."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tuner.constants import IGNORE_INDEX
from tuner.engine.draft import write_file
from tuner.engine.frame import BaseStrategy
from tuner.engine.machine import peak_memory
from tuner.engine.precision import PRECISIONS
from tuner.engine.progress import COMPUTE, SUM, UPDATE, Progress
from tuner.engine.schedule import WarmupCosine
from tuner.engine.tally import Own, Tally, gather_rows, tally
from tuner.engine.tensor_files import TensorFiles, file_name, share_of, tensor_pieces
from tuner.engine.world import ALONE, World, own_device, read_world
from tuner.errors import UserError
from tuner.model.hollow import Hold
from tuner.parallel.mesh import Degrees, Mesh, read_degrees
from tuner.parallel.ranks import Ranks
from tuner.parallel.sequence import cut

Batch = Mapping[str, Any]
Skip = Literal["", "overflow", "nonfinite", "spike", "spoiled", "stepped over"]


OWN_MESH = Mesh(Degrees(), *(Ranks([0], 0) for _ in range(4)))


class StepResult(NamedTuple):
    """What one optimizer step did, over all ranks; all plain numbers, so keeping them keeps no tensor alive."""

    loss: float  # mean over the trained tokens of the step, by their weights
    grad_norm: float  # before clipping
    lr: float  # the one this step used
    num_loss_tokens: int
    num_tokens: int
    sum_squared_lengths: int  # over documents; what attention costs
    tally: Tally  # how the ranks fared beside each other
    skip: Skip = ""  # why the weights stayed as they were; "overflow" is fp16's, which halves the loss scale

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were."""
        return self.skip != ""


class RefusedStepError(ArithmeticError):
    """A step that must not change weights or optimizer; neither was touched but by a `SpoiledStepError`.

    `result` says what the step would have been.
    """

    def __init__(self, problem: str, result: StepResult) -> None:
        super().__init__(problem)
        self.result = result


class NonFiniteStepError(RefusedStepError):
    """Loss or gradient is NaN or infinite."""


class SpoiledStepError(RefusedStepError):
    """The gradient is NaN or infinite, and the optimizer, which is in backward, has used it: only going back helps."""


class SpikeError(RefusedStepError):
    """The loss is far above those before it."""


def wish_nothing() -> int:
    """For a run that nothing but its last step ends."""
    return 0


class Strategy(BaseStrategy):
    """One way to hold weights, gradients and optimizer state over the ranks of a run.

    The loss of a micro-batch on a rank is its part of the step's: a sum, already divided by the trained tokens of all
    ranks and micro-batches. So losses and gradients are summed over ranks, never averaged.
    """

    model: nn.Module
    """the method whose `llm` is trained; what wraps it for several ranks stays inside the strategy"""

    def __init__(
        self,
        *,
        precision: Literal["bf16", "fp16", "fp32"] = "bf16",
        sequence_parallel_size: int | Mapping[str, int] = 1,
        device: str = "auto",
    ) -> None:
        """`sequence_parallel_size`: how many ranks share a sequence, or {"ulysses": 8, "ring": 2}."""
        # BaseStrategy.__init__ makes directories, seeds and joins process groups: all of that is train.py's
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision!r} is unknown. Choose one of {', '.join(PRECISIONS)}.")
        self.device = own_device(read_world()) if device == "auto" else torch.device(device)
        self.precision = precision
        self.degrees = read_degrees(sequence_parallel_size)
        self.step = 0  # optimizer steps done
        self.num_steps = 0
        self.world, self.mesh = ALONE, OWN_MESH
        self.progress = Progress()
        self._prepared = False

    def place(self, world: World, mesh: Mesh) -> None:
        """Say which process of the run this is, and with whom it shares sequences; before `prepare`."""
        self.world, self.mesh = world, mesh

    def holder(self) -> Hold | None:
        """Who takes the weights of an LLM one by one; None where each rank builds it whole."""
        return None

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        *,
        optim_wrapper: Mapping[str, Any],
        param_scheduler: WarmupCosine,
        num_steps: int,
    ) -> nn.Module:
        """Take the model, build its optimizer; the schedule spans `num_steps`."""

    @abstractmethod
    def backward(self, batch: Batch, *, is_last: bool) -> torch.Tensor:
        """Add a micro-batch's gradient; with the last one the ranks' are summed. Returns its loss, detached."""

    @abstractmethod
    def gradient_norm(self) -> torch.Tensor:
        """() L2 norm of the step's whole gradient, free of the loss scale, the same on all ranks."""

    @abstractmethod
    def update(self, norm: float) -> None:
        """Clip by the norm, let the optimizer step, and drop the gradient."""

    @abstractmethod
    def drop_gradient(self) -> None:
        """Forget the gradient of this step."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Iterable[tuple[str, Tensor]]]:
        """What a checkpoint holds, by kind: each tensor whole, gathered when asked for, by all ranks alike."""

    @abstractmethod
    def state_counters(self) -> dict[str, Any]:
        """What else `resume` needs, for JSON: steps done and in all, loss scale."""

    def save_checkpoint(self, filename: Path) -> dict[str, Any]:
        """Write this rank's part of weights and optimizer into the directory `filename`; returns the counters.

        Raises:
            NonFiniteTensorError: a value is NaN or infinite.
            OSError: the disk refused.
        """
        for kind, tensors in self.state_tensors().items():
            share = share_of(kind, tensors, self.world)
            write_file(filename / file_name(kind, self.world), tensor_pieces(kind, share))
        return self.state_counters()

    @abstractmethod
    def load_checkpoint(self, filename: Path) -> None:
        """Read the weights alone from the directory `filename`."""

    @abstractmethod
    def resume(self, filename: Path, state: Mapping[str, Any]) -> None:
        """Read what `state_tensors` and `state_counters` gave, on any number of ranks and by any strategy."""

    def autocast(self) -> AbstractContextManager:
        """The context of every forward pass, the sampled chat's included."""
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def generation(self) -> AbstractContextManager:
        """Where the llm may be called by itself, without gradients and by all ranks alike: the sampled chat."""
        return self.autocast()

    def train_step(
        self, batches: Sequence[Batch], *, stop: Callable[[], int] = wish_nothing, loss_limit: float = math.inf
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        The host waits for the device once, to read the facts of all ranks and the norm together.

        Args:
            batches: of this rank.
            stop: what asks this rank to end the run, see `Own.stop`; asked late, once its gradient is there.
            loss_limit: above which a loss is a spike.

        Raises:
            NonFiniteStepError, SpikeError: on all ranks, before the optimizer could carry it into the weights.
        """
        self.progress.enter(COMPUTE)
        lr = self.set_learning_rates()
        loss = torch.zeros((), device=self.device)
        for place, batch in enumerate(batches):
            part = self._to_device(cut(batch, self.mesh.degrees, self.mesh.sequence.rank))
            loss = loss + self.backward(part, is_last=place == len(batches) - 1)
        self.progress.enter(SUM)
        times = (self.progress.data_seconds, self.progress.take_idle_seconds(), peak_memory(self.device))
        rows = gather_rows(Own(0, *count_tokens(batches), *times, stop()), loss, self.world)
        *values, norm = torch.cat([rows.flatten(), self.gradient_norm().to(rows).reshape(1)]).tolist()
        sums = tally(values, self.mesh.degrees.size)
        self.progress.enter(UPDATE)
        result = self._judged(as_result(sums, norm, lr), loss_limit)
        self.update(norm)
        self.step += 1
        return result

    def step_over(self) -> StepResult:
        """Count a step that is not taken."""
        lr = self.set_learning_rates()
        self.step += 1
        nothing = tally([0.0] * len(Own._fields), 1)
        return as_result(nothing, math.nan, lr)._replace(loss=math.nan, skip="stepped over")

    @abstractmethod
    def set_learning_rates(self) -> float:
        """Give every group of parameters the rate of this step; returns that of the first."""

    def _to_device(self, batch: Batch) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _judged(self, result: StepResult, loss_limit: float) -> StepResult:
        """The result, marked where the loss scale will make this step be skipped; raise where that is no cure."""
        is_loss_finite, problem = math.isfinite(result.loss), f"loss {result.loss}, gradient norm {result.grad_norm}"
        if is_loss_finite and not math.isfinite(result.grad_norm) and self.can_scale_down():
            return result._replace(skip="overflow")
        if not is_loss_finite or not math.isfinite(result.grad_norm):
            self.refuse_gradient()
            raise NonFiniteStepError(problem, result._replace(skip="nonfinite"))
        if result.loss > loss_limit:
            self.refuse_gradient()
            raise SpikeError(f"{problem}: the loss is above {loss_limit:.4g}", result._replace(skip="spike"))
        return result

    def refuse_gradient(self) -> None:
        """Forget a gradient whose norm was taken, so that neither weights nor optimizer see it."""
        self.drop_gradient()

    @abstractmethod
    def can_scale_down(self) -> bool:
        """Whether a gradient that overflowed may be the loss scale's doing."""


def as_result(sums: Tally, norm: float, lr: float) -> StepResult:
    """What a step did, from what ranks told each other."""
    return StepResult(
        loss=sums.loss,
        grad_norm=norm,
        lr=lr,
        num_loss_tokens=sums.num_loss_tokens,
        num_tokens=sums.num_tokens,
        sum_squared_lengths=sums.sum_squared_lengths,
        tally=sums,
    )


class TokenCounts(NamedTuple):
    """What a step read."""

    num_loss_tokens: int
    num_tokens: int
    sum_squared_lengths: int


def count_tokens(batches: Sequence[Batch]) -> TokenCounts:
    """Of this rank's micro-batches, before sequences are cut; read on the host, before the device."""
    lengths = torch.cat([batch["cu_seqlens"].diff().to(torch.int64) for batch in batches])
    num_loss_tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    return TokenCounts(num_loss_tokens, int(lengths.sum()), int((lengths * lengths).sum()))


def schedule_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Each group's peak times the schedule's factor; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def read_max_norm(optim_wrapper: Mapping[str, Any]) -> float | None:
    """The norm at which `optim_wrapper` clips; None for no clipping."""
    unknown = sorted(set(optim_wrapper) - {"optimizer", "clip_grad", "lora_plus_ratio", "in_backward"})
    clip = optim_wrapper.get("clip_grad") or {}
    unknown += [f"clip_grad.{name}" for name in sorted(set(clip) - {"max_norm"})]
    if unknown:
        raise UserError(f"optim_wrapper has unknown keys {', '.join(unknown)}; known: optimizer, "
                        "clip_grad.max_norm, lora_plus_ratio, in_backward.")  # fmt: skip
    max_norm = clip.get("max_norm")
    if max_norm is not None and max_norm <= 0:
        raise UserError(f"max_norm={max_norm} would stop all learning. Choose a positive number, or None not to clip.")
    return max_norm


def compare_weights(saved: TensorFiles, expected: Mapping[str, torch.Size], source: Path) -> None:
    """UserError unless a checkpoint has exactly the model's weights, by name and shape."""
    problems = [f"no {name}" for name in expected if name not in saved]
    problems += [f"unknown {name}" for name in saved if name not in expected]
    for name, shape in expected.items():
        if name in saved and saved.shape(name) != tuple(shape):
            problems.append(f"{name} is {saved.shape(name)}, the model has {tuple(shape)}")
    if problems:
        shown = "; ".join(problems[:5])
        raise UserError(f"{source} is a checkpoint of another model ({len(problems)} differences): {shown}.")
