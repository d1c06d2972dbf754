"""The optimizer inside backward: each gradient moves its weight as soon as it is whole, and is gone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tuner.engine.tally import Own, gather_rows
from tuner.engine.world import World
from tuner.errors import UserError

SETTING = "optimizer_in_backward"
NOTHING = Own(*(0,) * len(Own._fields))


def is_wanted(optim_wrapper: Mapping[str, Any]) -> bool:
    """Whether a config's `optim_wrapper` asks for it."""
    return optim_wrapper.get("in_backward", False) is True


def obstacles(
    *, max_norm: float | None = None, precision: str = "fp32", deepspeed: str | None = None, num_batches: int = 1
) -> list[str]:
    """Why weights cannot move while backward still runs, by what else is set; each with what to do."""
    problems = []
    if max_norm is not None:
        problems.append(
            f"max_grad_norm={max_norm} scales a gradient by the norm of the whole, which is known when backward is "
            f"done; {SETTING}=True has used it by then. Set max_grad_norm=None, or {SETTING}=False."
        )
    if num_batches > 1:
        problems.append(
            f"A step has {num_batches} packs on a rank, and with {SETTING}=True the first would move the weights that "
            f"the next still needs. Set num_accumulation_steps=1, with stages that have one pack a step, or "
            f"{SETTING}=False."
        )
    if precision == "fp16":
        problems.append(
            f"precision='fp16' skips a step whose gradient overflows, which {SETTING}=True cannot take back. Set "
            f"precision='bf16', or {SETTING}=False."
        )
    if deepspeed is not None:
        problems.append(
            f"deepspeed={deepspeed!r} has an optimizer of its own, which {SETTING}=True cannot reach. Set fsdp='full' "
            f"in its place, or {SETTING}=False."
        )
    return problems


def refuse(problems: list[str]) -> None:
    """UserError with all of `obstacles`, if there are any."""
    if problems:
        raise UserError("\n".join(problems))


class InBackward:
    """Calls an optimizer for one parameter at a time, from hooks that autograd or FSDP2 run once its gradient is whole.

    Each parameter gets what a step over all of them would give it, bit for bit, for these optimizers look at one tensor
    at a time, and nothing in backward reads a weight whose gradient is whole. What has moved cannot be taken back: the
    loss is looked at before backward, the gradient only when it is used up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, llm: nn.Module, world: World, *, sums: bool) -> None:
        """From now on a backward is a step of `optimizer`.

        Args:
            optimizer: of the parameters of `llm` that train.
            llm: whose parameters come in an order that all ranks share.
            world: the ranks of the run.
            sums: whether gradients of the ranks are summed here; FSDP2 does so itself.

        Raises:
            UserError: an optimizer that may look at several tensors at once.
        """
        is_alone = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD))
        if not is_alone and type(optimizer).__name__ != "AdamW8bit":
            raise UserError(
                f"{SETTING}=True takes parameters one by one, and {type(optimizer).__name__} is not known to make the "
                f"same step of them then. Choose adamw, adamw8bit, or torch's Adam, AdamW or SGD, or {SETTING}=False."
            )
        self.optimizer, self.world, self.sums = optimizer, world, sums
        self.loss_limit = math.inf
        self.norms: dict[nn.Parameter, Tensor] = {}
        """of the gradients that this step has used, () each"""
        self._names = {parameter: name for name, parameter in llm.named_parameters() if parameter.requires_grad}
        self._waiting: list[nn.Parameter] = []  # for their turn to be summed; the next is the last
        self._groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in self._groups:
            parameter.register_post_accumulate_grad_hook(self._sum if sums else self._use)

    @property
    def has_moved(self) -> bool:
        """Whether this step has changed a weight."""
        return bool(self.norms)

    def begin(self, num_batches: int, loss_limit: float) -> None:
        """A step of so many micro-batches, whose loss is a spike above `loss_limit`; UserError if they are several."""
        refuse(obstacles(num_batches=num_batches))
        self.loss_limit = loss_limit
        self.norms = {}

    def allows(self, loss: Tensor) -> bool:
        """Whether the step's loss, to which this is a rank's part, is finite and no spike; all ranks ask together."""
        total = sum(gather_rows(NOTHING, loss, self.world)[:, 0].tolist())  # as the step's result adds it up
        return math.isfinite(total) and total <= self.loss_limit

    def backward(self, loss: Tensor) -> None:
        """Backward and step, where the loss allows it.

        Raises:
            UserError: ranks could not sum their gradients, since this one has not got all of them.
        """
        if not self.allows(loss.detach()):
            return
        self._waiting = list(self._names) if self.sums else []
        loss.backward()
        if self._waiting:
            raise UserError(
                f"{self._names[self._waiting[-1]]} got no gradient in this step, and ranks that do not have the same "
                f"gradients cannot sum them one by one. Set {SETTING}=False."
            )

    def norm(self) -> Tensor:
        """() L2 norm of the gradients that this rank used in the step, as `torch.nn.utils.get_total_norm` takes it."""
        used = [self.norms[parameter] for parameter in self._groups if parameter in self.norms]
        return torch.linalg.vector_norm(torch.stack(used)) if used else torch.tensor(0.0)

    def _sum(self, parameter: Tensor) -> None:
        """Sum over ranks what is whole, as far as its turn has come: in the same order on all of them."""
        while self._waiting and (found := self._waiting[-1]).grad is not None:
            self._waiting.pop()
            dist.all_reduce(found.grad)
            self._use(found)

    @torch.no_grad()
    def _use(self, parameter: Any) -> None:
        """Step with one parameter, and forget its gradient."""
        gradient = parameter.grad
        self.norms[parameter] = torch.linalg.vector_norm(own_part(gradient))
        groups, group = self.optimizer.param_groups, self._groups[parameter]
        others = group["params"]
        self.optimizer.param_groups, group["params"] = [group], [parameter]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups, group["params"] = groups, others
        parameter.grad = None


def own_part(gradient: Tensor) -> Tensor:
    """What this rank holds of it."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
