"""Every rank holds the whole model: one process alone, or several whose gradients are summed while backward runs."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tuner.engine.precision import PRECISIONS
from tuner.engine.stepping import Stepping
from tuner.engine.strategy import Batch
from tuner.model.adapter import set_compute_dtype


class Replicated(Stepping):
    """fp32 (or wider) weights and the optimizer on every rank; the forward pass runs in `precision`.

    Under an adapter the frozen linear layers are kept in `precision`, in which they compute.
    """

    def spread(self, model: nn.Module) -> nn.Module:
        """Move the whole model to the device; the ranks agree to sum gradients."""
        if self.precision != "fp32":
            set_compute_dtype(model.get_submodule("llm"), PRECISIONS[self.precision])
        model = model.to(self.device)
        is_summed = self.world.size > 1 and not self.steps_in_backward  # its buckets are a whole gradient, all the time
        self._distributed_model = summing(model, self.device) if is_summed else None
        return model

    def sums_in_backward(self) -> bool:
        """Where there are several ranks."""
        return self.world.size > 1

    def backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Add a micro-batch's gradient; with the last one the ranks' gradients are summed."""
        wrapper = self._distributed_model
        context = wrapper.no_sync() if wrapper is not None and not is_last else nullcontext()
        with context:
            with self.autocast():
                loss = (self.model if wrapper is None else wrapper)(**batch)["loss"]
            self.run_backward(loss)
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """() L2 norm of the whole gradient: all ranks hold the sum, so nothing is exchanged."""
        return self.own_norm()


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
