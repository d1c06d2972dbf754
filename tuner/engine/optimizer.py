"""The optimizer of a config: its type with parameter groups; norms and biases are never decayed."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tuner.engine.assemble import check_arguments
from tuner.errors import UserError
from tuner.model.hollow import whole_shape

FUSED_OVER_RANKS = (torch.optim.Adam, torch.optim.AdamW)
"""the fused optimizers that torch has for DTensors"""


def build_optimizer(model: nn.Module, node: Mapping[str, Any]) -> torch.optim.Optimizer:
    """`dict(type=AdamW, lr=..., weight_decay=...)` -> optimizer over the trained parameters of `model`.

    Parameters of fewer than two dimensions (norms, biases) form a group of their own with weight decay 0. The fused
    implementation is taken where the type has one for these tensors: one pass over memory instead of about ten.
    Each group keeps the config's learning rate as `peak_lr`; the schedule multiplies it.
    """
    optimizer_type = node["type"]
    arguments = {name: value for name, value in node.items() if name != "type"}
    check_arguments(optimizer_type, {"params": [], **arguments})
    groups = parameter_groups(model)
    if "fused" in inspect.signature(optimizer_type).parameters:
        is_spread = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
        arguments.setdefault("fused", True if not is_spread or optimizer_type in FUSED_OVER_RANKS else None)
    if not groups:
        raise UserError("The model has no parameter to train: every one has requires_grad=False.")
    optimizer = optimizer_type(groups, **arguments)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters as decayed and undecayed groups, with their names beside them."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [pair for pair in trained if len(whole_shape(pair[1])) >= 2]
    undecayed = [pair for pair in trained if len(whole_shape(pair[1])) < 2]
    groups: list[dict[str, Any]] = []
    if decayed:
        groups.append({"params": [parameter for _, parameter in decayed], "names": [name for name, _ in decayed]})
    if undecayed:
        groups.append({"params": [parameter for _, parameter in undecayed], "names": [name for name, _ in undecayed]})
        groups[-1]["weight_decay"] = 0.0
    return groups


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter name>.<state name>` -> tensor; nothing else is needed to go on."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in sorted(optimizer.state[parameter].items()):  # of a resumed run they come in another order
                assert isinstance(value, torch.Tensor), f"{type(optimizer).__name__} keeps {key!r} as {type(value)}"
                tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`, one tensor at a time; one of an unknown parameter is a UserError."""
    remaining = set(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            own = sorted(key for key in remaining if is_state(key, f"{name}."))
            remaining.difference_update(own)
            # fused optimizers keep each state tensor beside its parameter, the step counter included
            state = {key.removeprefix(f"{name}."): tensors[key].to(parameter.device) for key in own}
            optimizer.state[parameter] = state
    if remaining:
        raise UserError(f"The checkpoint's optimizer knows parameters that the model has not: {sorted(remaining)[:3]}.")


def is_state(key: str, prefix: str) -> bool:
    """Whether a tensor's key is `prefix` and a state name, not a longer parameter name."""
    return key.startswith(prefix) and "." not in key[len(prefix) :]
