"""The optimizer of a config: parameter groups; norms and biases are never decayed, B's may learn faster."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tuner.engine.assemble import check_arguments
from tuner.errors import UserError
from tuner.model.adapter_weights import bitsandbytes
from tuner.model.hollow import whole_shape

KINDS = ("adamw", "adamw8bit")
FUSED_OVER_RANKS = (torch.optim.Adam, torch.optim.AdamW)
"""the fused optimizers that torch has for DTensors"""


def build_optimizer(model: nn.Module, optim_wrapper: Mapping[str, Any]) -> torch.optim.Optimizer:
    """`optimizer=dict(type=AdamW, lr=..., weight_decay=...)` -> optimizer over the trained parameters of `model`.

    Parameters of fewer than two dimensions (norms, biases) form a group of their own with weight decay 0. The fused
    implementation is taken where the type has one for these tensors: one pass over memory instead of about ten.
    Each group keeps the config's learning rate as `peak_lr`; the schedule multiplies it. With a `lora_plus_ratio`
    that of LoRA's B is so many times as high (LoRA+, arXiv 2402.12354).
    """
    node = optim_wrapper["optimizer"]
    optimizer_type, arguments = named_type(node)
    check_arguments(optimizer_type, {"params": [], **arguments})
    groups = parameter_groups(model)
    if (ratio := optim_wrapper.get("lora_plus_ratio")) is not None:
        groups = with_faster_b(groups, ratio * arguments["lr"])
    if "fused" in inspect.signature(optimizer_type).parameters:
        is_spread = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
        arguments.setdefault("fused", True if not is_spread or optimizer_type in FUSED_OVER_RANKS else None)
    if not groups:
        raise UserError("The model has no parameter to train: every one has requires_grad=False.")
    optimizer = optimizer_type(groups, **arguments)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def adamw(
    params: Iterable[Any],
    *,
    kind: str = "adamw",
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """AdamW by name: torch's ("adamw"), or bitsandbytes' whose moments are 8 bits in blocks ("adamw8bit")."""
    optimizer_type, _ = named_type({"type": adamw, "kind": kind})
    return optimizer_type(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def named_type(node: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and what it is called with.

    Raises:
        UserError: an unknown kind of `adamw`, or bitsandbytes is not installed.
    """
    arguments = {name: value for name, value in node.items() if name != "type"}
    if node["type"] is not adamw:
        return node["type"], arguments
    kind = arguments.pop("kind", "adamw")
    if kind not in KINDS:
        raise UserError(f"optimizer={kind!r} is unknown. Choose one of {', '.join(KINDS)}.")
    return torch.optim.AdamW if kind == "adamw" else bitsandbytes().optim.AdamW8bit, arguments


def with_faster_b(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """The groups with those of LoRA's B apart, at a learning rate of their own; the logged rate stays the first's.

    Raises:
        UserError: there is no B.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"]))
        for own, is_b in (({}, False), ({"lr": lr}, True)):
            chosen = [pair for pair in pairs if (".lora_B." in pair[0]) == is_b]
            if chosen:
                names, params = [name for name, _ in chosen], [parameter for _, parameter in chosen]
                split.append({**group, **own, "names": names, "params": params})
    if all("lr" not in group for group in split):
        raise UserError("lora_plus_ratio is for LoRA's B, and this model has none. Set it to None.")
    return sorted(split, key=lambda group: "lr" in group)


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
                kept = torch.tensor(value) if type(value) is int else value  # bitsandbytes' count of steps
                assert isinstance(kept, torch.Tensor), f"{type(optimizer).__name__} keeps {key!r} as {type(kept)}"
                tensors[f"{name}.{key}"] = kept
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`, one tensor at a time; one of an unknown parameter is a UserError."""
    remaining = set(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            own = sorted(key for key in remaining if is_state(key, f"{name}."))
            remaining.difference_update(own)
            # fused optimizers keep each state tensor beside its parameter, the step counter included
            state: dict[str, Any] = {key.removeprefix(f"{name}."): tensors[key].to(parameter.device) for key in own}
            if "step" in state and state["step"].dtype == torch.int64:
                state["step"] = int(state["step"])
            optimizer.state[parameter] = state
    if remaining:
        raise UserError(f"The checkpoint's optimizer knows parameters that the model has not: {sorted(remaining)[:3]}.")


def is_state(key: str, prefix: str) -> bool:
    """Whether a tensor's key is `prefix` and a state name, not a longer parameter name."""
    return key.startswith(prefix) and "." not in key[len(prefix) :]
