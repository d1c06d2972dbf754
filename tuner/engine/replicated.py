"""Every rank holds the whole model: one process alone, or several whose gradients are summed while backward runs."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tuner.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import Batch, Strategy, compare_weights, read_max_norm, save_tensors, schedule_rates
from tuner.engine.tensor_files import OPTIMIZER, WEIGHTS, TensorFiles


class Replicated(Strategy):
    """fp32 (or wider) weights and the optimizer on every rank; the forward pass runs in `precision`."""

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
        self._distributed_model = summing(self.model, self.device) if self.world.size > 1 else None
        self._prepared = True
        return self.model

    def set_learning_rates(self) -> float:
        """Give every group of parameters the rate of this step; returns that of the first."""
        return schedule_rates(self.optimizer, self.schedule.factor(self.step, self.num_steps))

    def backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Add a micro-batch's gradient; with the last one the ranks' gradients are summed."""
        wrapper = self._distributed_model
        context = wrapper.no_sync() if wrapper is not None and not is_last else nullcontext()
        with context:
            with self.autocast():
                loss = (self.model if wrapper is None else wrapper)(**batch)["loss"]
            self.scaler.scale(loss).backward()
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """() L2 norm of the whole gradient: all ranks hold the sum, so nothing is exchanged."""
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])

    def update(self, norm: float) -> None:
        """Clip by the norm, let the optimizer step, and drop the gradient."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters(), self.max_grad_norm, torch.tensor(norm, dtype=torch.float64)
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.drop_gradient()

    def drop_gradient(self) -> None:
        """Forget the gradient of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    def can_scale_down(self) -> bool:
        """Whether a gradient that overflowed may be the loss scale's doing."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def save_checkpoint(self, filename: Path) -> dict[str, Any]:
        """Write this rank's share of weights and optimizer into the directory `filename`; returns the rest."""
        weights = self.model.get_submodule("llm").named_parameters()
        save_tensors(filename, self.world, weights, optimizer_tensors(self.optimizer).items())
        return {"step": self.step, "num_steps": self.num_steps, "scaler": self.scaler.state_dict()}

    def load_checkpoint(self, filename: Path) -> None:
        """Read the weights alone from the directory `filename`."""
        weights = dict(self.model.get_submodule("llm").named_parameters())
        saved = TensorFiles(filename, WEIGHTS)
        compare_weights(saved, {name: weight.shape for name, weight in weights.items()}, filename)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])

    def resume(self, filename: Path, state: Mapping[str, Any]) -> None:
        """Read everything that `save_checkpoint` wrote and returned."""
        self.load_checkpoint(filename)
        load_optimizer_tensors(self.optimizer, TensorFiles(filename, OPTIMIZER))
        self.step = state["step"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def summing(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model in torch's DDP, which sums gradients over all ranks, bucket by bucket, while backward still runs."""
    wrapper = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    wrapper.register_comm_hook(None, sum_bucket)
    return wrapper


def sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum where DDP's own reduction is the mean: a rank's loss is a part of the step's, not a mean of its own."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
