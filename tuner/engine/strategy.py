"""One process on one device: precision, gradients over micro-batches, clipping, the optimizer's step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from mmengine._strategy import BaseStrategy
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.constants import IGNORE_INDEX
from tuner.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tuner.engine.schedule import WarmupCosine
from tuner.errors import UserError

Batch = Mapping[str, Any]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = "model-00000-of-00001.safetensors"
OPTIMIZER = "optimizer.safetensors"


class StepResult(NamedTuple):
    """What one optimizer step did; all plain numbers, so keeping them keeps no tensor alive."""

    loss: float  # mean over the trained tokens of the step, by their weights
    grad_norm: float  # before clipping
    lr: float  # the one this step used
    num_loss_tokens: int
    num_tokens: int
    sum_squared_lengths: int  # over documents; what attention costs
    skipped: bool  # fp16 only: the gradient overflowed, the weights stay, the loss scale is halved


class NonFiniteStepError(ArithmeticError):
    """Loss or gradient is NaN or infinite; the weights were not touched."""


class SingleDevice(BaseStrategy):
    """fp32 (or wider) master weights on one device; the forward pass runs in `precision`."""

    def __init__(self, *, precision: Literal["bf16", "fp16", "fp32"] = "bf16", device: str = "auto") -> None:
        # BaseStrategy.__init__ makes directories, seeds and joins process groups: all of that is train.py's
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision!r} is unknown. Choose one of {', '.join(PRECISIONS)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.precision = precision
        self.step = 0  # optimizer steps done
        self.num_steps = 0
        self._prepared = False

    def prepare(
        self,
        model: nn.Module,
        *,
        optim_wrapper: Mapping[str, Any],
        param_scheduler: WarmupCosine,
        num_steps: int,
    ) -> nn.Module:
        """Move the model to the device and build its optimizer; the schedule spans `num_steps`."""
        self.model = model.to(self.device).train()
        self.num_steps = num_steps
        self.schedule = param_scheduler
        self.optimizer = build_optimizer(model.get_submodule("llm"), optim_wrapper["optimizer"])
        self.max_grad_norm = read_max_norm(optim_wrapper)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._prepared = True
        return self.model

    def autocast(self) -> AbstractContextManager:
        """The context of every forward pass, the sampled chat's included."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over its micro-batches, whose losses are already divided by `num_loss_tokens`.

        The host waits for the device once, to read loss and norm together.

        Raises:
            NonFiniteStepError: before the optimizer could carry a NaN into the weights.
        """
        lr = self._set_learning_rates()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            with self.autocast():
                micro_loss = self.model(**self._to_device(batch))["loss"]
            self.scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        skipped = self._check_finite(loss_value, norm_value)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(loss_value, norm_value, lr, *count_tokens(batches), skipped)

    def _set_learning_rates(self) -> float:
        factor = self.schedule.factor(self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.optimizer.param_groups[0]["lr"]

    def _to_device(self, batch: Batch) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _check_finite(self, loss: float, grad_norm: float) -> bool:
        """Whether the scaler will skip this step; raise where a skip is no cure."""
        if torch.isfinite(torch.tensor([loss, grad_norm])).all():
            return False
        self.optimizer.zero_grad(set_to_none=True)
        is_overflow = self.scaler.is_enabled() and loss == loss and abs(loss) != float("inf")
        if is_overflow and self.scaler.get_scale() > 1:
            return True
        raise NonFiniteStepError(f"loss {loss}, gradient norm {grad_norm}")

    def save_checkpoint(self, filename: Path) -> dict[str, Any]:
        """Write weights and optimizer into the directory `filename`; returns the rest, for JSON."""
        weights = dict(self.model.get_submodule("llm").named_parameters())
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise NonFiniteStepError(f"weight {name} at step {self.step}")
        write_tensors(filename / WEIGHTS, weights)
        write_tensors(filename / OPTIMIZER, optimizer_tensors(self.optimizer))
        return {"step": self.step, "num_steps": self.num_steps, "scaler": self.scaler.state_dict()}

    def load_checkpoint(self, filename: Path) -> None:
        """Read the weights alone from the directory `filename`."""
        weights = dict(self.model.get_submodule("llm").named_parameters())
        saved = load_file(filename / WEIGHTS)
        compare_weights(saved, weights, filename)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])

    def resume(self, filename: Path, state: Mapping[str, Any]) -> None:
        """Read everything that `save_checkpoint` wrote and returned."""
        self.load_checkpoint(filename)
        load_optimizer_tensors(self.optimizer, load_file(filename / OPTIMIZER))
        self.step = state["step"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))


def read_max_norm(optim_wrapper: Mapping[str, Any]) -> float | None:
    """The norm at which `optim_wrapper` clips; None for no clipping."""
    unknown = sorted(set(optim_wrapper) - {"optimizer", "clip_grad"})
    clip = optim_wrapper.get("clip_grad") or {}
    unknown += [f"clip_grad.{name}" for name in sorted(set(clip) - {"max_norm"})]
    if unknown:
        raise UserError(f"optim_wrapper has unknown keys {', '.join(unknown)}; known: optimizer, clip_grad.max_norm.")
    max_norm = clip.get("max_norm")
    if max_norm is not None and max_norm <= 0:
        raise UserError(f"max_norm={max_norm} would stop all learning. Choose a positive number, or None not to clip.")
    return max_norm


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Trained tokens, all tokens and sum of squared document lengths of a step; read on the host, before the device."""
    lengths = torch.cat([batch["cu_seqlens"].diff().to(torch.int64) for batch in batches])
    num_loss_tokens = batches[0]["num_loss_tokens"]
    if isinstance(num_loss_tokens, float):  # the sum of their weights: what they cost is their number
        num_loss_tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    return num_loss_tokens, int(lengths.sum()), int((lengths * lengths).sum())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of these tensors; OSError where the disk refuses."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def compare_weights(saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: Path) -> None:
    """UserError unless a checkpoint has exactly the model's weights, by name and shape."""
    problems = [f"no {name}" for name in expected if name not in saved]
    problems += [f"unknown {name}" for name in saved if name not in expected]
    for name, weight in expected.items():
        if name in saved and saved[name].shape != weight.shape:
            problems.append(f"{name} is {tuple(saved[name].shape)}, the model has {tuple(weight.shape)}")
    if problems:
        shown = "; ".join(problems[:5])
        raise UserError(f"{source} is a checkpoint of another model ({len(problems)} differences): {shown}.")
