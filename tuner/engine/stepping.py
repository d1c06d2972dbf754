"""What strategies share that let torch's optimizer step on the tensors of this rank: rates, clipping, loss scale."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.engine import in_backward
from tuner.engine.in_backward import InBackward, obstacles, own_part, refuse
from tuner.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tuner.engine.own_parts import OwnParts, whole
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import (
    Batch,
    NonFiniteStepError,
    SpoiledStepError,
    StepResult,
    Strategy,
    compare_weights,
    read_max_norm,
    schedule_rates,
    wish_nothing,
)
from tuner.engine.tensor_files import OPTIMIZER, WEIGHTS, TensorFiles
from tuner.model.adapter import kept_parameters


class Stepping(Strategy):
    """Weights are plain tensors or DTensors; what is saved of either is the same."""

    def prepare(
        self,
        model: nn.Module,
        *,
        optim_wrapper: Mapping[str, Any],
        param_scheduler: WarmupCosine,
        num_steps: int,
    ) -> nn.Module:
        """Spread the model and build its optimizer; the schedule spans `num_steps`."""
        self.max_grad_norm = read_max_norm(optim_wrapper)
        self.steps_in_backward = in_backward.is_wanted(optim_wrapper)
        if self.steps_in_backward:
            refuse(obstacles(max_norm=self.max_grad_norm, precision=self.precision))
        self.model = self.spread(model).train()
        self.num_steps = num_steps
        self.schedule = param_scheduler
        llm = self.model.get_submodule("llm")
        self.optimizer = build_optimizer(llm, optim_wrapper)
        self.in_backward = None
        if self.steps_in_backward:
            self.in_backward = InBackward(self.optimizer, llm, self.world, sums=self.sums_in_backward())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._prepared = True
        return self.model

    @abstractmethod
    def spread(self, model: nn.Module) -> nn.Module:
        """Put this rank's part of the model on its device; all ranks have built it alike."""

    def sums_in_backward(self) -> bool:
        """Whether the ranks' gradients are still apart when autograd has made them, and nothing else sums them."""
        return False

    def train_step(
        self, batches: Sequence[Batch], *, stop: Callable[[], int] = wish_nothing, loss_limit: float = math.inf
    ) -> StepResult:
        """As of all strategies; with the optimizer in backward a gradient is known to be bad once it is used.

        Raises:
            SpoiledStepError: then.
        """
        if self.in_backward is not None:
            self.in_backward.begin(len(batches), loss_limit)
        try:
            return super().train_step(batches, stop=stop, loss_limit=loss_limit)
        except NonFiniteStepError as error:
            if self.in_backward is None or not self.in_backward.has_moved:
                raise
            raise SpoiledStepError(str(error), error.result._replace(skip="spoiled")) from error

    def run_backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss, or, with the optimizer in backward, step by it."""
        if self.in_backward is not None:
            self.in_backward.backward(loss)
        else:
            self.scaler.scale(loss).backward()

    def own_norm(self) -> Tensor:
        """() L2 norm of what this rank holds of the step's gradient, free of the loss scale."""
        if self.in_backward is not None:
            return self.in_backward.norm()
        self.scaler.unscale_(self.optimizer)
        held = [own_part(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(held)

    def set_learning_rates(self) -> float:
        """Give every group of parameters the rate of this step; returns that of the first."""
        return schedule_rates(self.optimizer, self.schedule.factor(self.step, self.num_steps))

    def update(self, norm: float) -> None:
        """Clip by the norm, let the optimizer step, and drop the gradient."""
        if self.in_backward is not None:
            return
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters(), self.max_grad_norm, torch.tensor(norm, dtype=torch.float64)
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.drop_gradient()

    def drop_gradient(self) -> None:
        """Forget the gradient of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    def refuse_gradient(self) -> None:
        """Forget a gradient whose norm was taken; the loss scale stays, for the gradient did not overflow."""
        self.drop_gradient()
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # the gradient of the next step can be unscaled

    def can_scale_down(self) -> bool:
        """Whether a gradient that overflowed may be the loss scale's doing."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_tensors(self) -> dict[str, Iterable[tuple[str, Tensor]]]:
        """What a checkpoint holds, by kind: each tensor whole, gathered when it is asked for."""
        weights = kept_parameters(self.model.get_submodule("llm"))
        return {WEIGHTS: whole(weights), OPTIMIZER: whole(optimizer_tensors(self.optimizer).items())}

    def state_counters(self) -> dict[str, Any]:
        """What else `resume` needs, for JSON."""
        return {"step": self.step, "num_steps": self.num_steps, "scaler": self.scaler.state_dict()}

    def load_checkpoint(self, filename: Path) -> None:
        """Read the weights alone from the directory `filename`."""
        weights = dict(kept_parameters(self.model.get_submodule("llm")))
        saved = TensorFiles(filename, WEIGHTS)
        compare_weights(saved, {name: weight.shape for name, weight in weights.items()}, filename)
        own = OwnParts(saved, weights)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(own[name])

    def resume(self, filename: Path, state: Mapping[str, Any]) -> None:
        """Read what `state_tensors` and `state_counters` gave."""
        self.load_checkpoint(filename)
        weights = dict(self.model.get_submodule("llm").named_parameters())
        load_optimizer_tensors(self.optimizer, OwnParts(TensorFiles(filename, OPTIMIZER), weights))
        self.step = state["step"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))

    def parameters(self) -> list[nn.Parameter]:
        """Those that train, as the optimizer has them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
