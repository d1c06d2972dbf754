"""A LoRA adapter's directory: for each tensor of the base, its change of low rank or what comes in its place."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuner.convert.tensors import StoredTensor, stored_tensors
from tuner.errors import UserError
from tuner.model.adapter_directory import check_adapter_weights, read_adapter_config
from tuner.model.base_note import read_base_note

PREFIX = "base_model.model."
MARKS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
         "lora_B.bias", "base_layer.weight", "base_layer.bias")  # fmt: skip
"""what peft appends to the names of modules"""
FREE_KEYS = frozenset(
    (
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
        "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out",
        "bias", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "lora_bias", "ensure_weight_tying",
        "qalora_group_size", "runtime_config", "eva_config",
    )
)  # fmt: skip
"""settings that are known; of any other, one that is set may mean a change that would be lost"""
KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""ways to begin that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it"""


@dataclass(frozen=True)
class LowRank:
    """W -> W + scale * up @ down, and where there is a magnitude, each row is then given that length.

    Where `is_turned`, as for embeddings, it is so of the transposed W. Nothing is read before it is asked for.
    """

    down: StoredTensor
    """(r, inputs)"""
    up: StoredTensor
    """(outputs, r)"""
    scale: float
    magnitude: StoredTensor | None = None
    """(outputs,), perhaps with axes of length 1: DoRA's, https://arxiv.org/abs/2402.09353 equation 5"""
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        outputs, inputs = self.up.shape[0], self.down.shape[1]
        return (inputs, outputs) if self.is_turned else (outputs, inputs)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (rows, r) and (r, columns) of the weight; their product, times `scale`, is added to it."""
        down, up = self.down.whole().float(), self.up.whole().float()
        return (down.T.contiguous(), up.T.contiguous()) if self.is_turned else (up, down)


@dataclass(frozen=True)
class Adapter:
    """All that an adapter does to a base, by the base's names of tensors."""

    directory: Path
    config: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)
    """what `tuner convert` noted of the base: its fingerprint, and whether it was quantised in training"""
    changes: dict[str, LowRank] = field(default_factory=dict)
    successors: dict[str, StoredTensor] = field(default_factory=dict)
    """tensors that stand in the place of the base's: modules_to_save, trained biases"""
    bias_changes: dict[str, tuple[float, StoredTensor]] = field(default_factory=dict)
    """a scale and what it scales, added to the base's"""

    @property
    def names(self) -> set[str]:
        """Of all tensors of the base that it changes."""
        return {*self.changes, *self.successors, *self.bias_changes}


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory that peft or `tuner convert` wrote.

    Raises:
        UserError: it is none, is damaged, or has settings whose meaning is not known here.
    """
    config = read_adapter_config(directory)
    unknown = sorted(key for key, value in config.items() if value and key not in FREE_KEYS)
    if unknown:
        raise UserError(f"{directory} sets {', '.join(unknown)}, which merging does not know. Merge it with peft.")
    if config.get("init_lora_weights", True) not in KEEP_BASE:
        raise UserError(
            f"{directory} began with init_lora_weights={config['init_lora_weights']!r}, which changes the base model. "
            "Convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion) first."
        )
    parts: dict[str, dict[str, StoredTensor]] = {}
    adapter = Adapter(directory, config, read_base_note(directory, "quantise", "compute_dtype"))
    for key, tensor in stored_tensors(check_adapter_weights(directory)).items():
        name = key.removeprefix(PREFIX)
        mark = next((mark for mark in MARKS if name.endswith(f".{mark}")), None)
        if mark is None:
            adapter.successors[name] = tensor
        elif mark.startswith("base_layer."):
            adapter.successors[name.replace(".base_layer.", ".")] = tensor  # an embedding that goes with its adapter
        else:
            parts.setdefault(name.removesuffix(f".{mark}"), {})[mark] = tensor
    for module, tensors in parts.items():
        add_change(adapter, module, tensors)
    return adapter


def add_change(adapter: Adapter, module: str, tensors: Mapping[str, StoredTensor]) -> None:
    """What the tensors of one module do to its weight and bias."""
    is_embedding = "lora_embedding_A" in tensors
    first, second = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    down, up = tensors.get(first), tensors.get(second)
    if down is None or up is None or (len(down.shape), len(up.shape)) != (2, 2) or down.shape[0] != up.shape[1]:
        raise UserError(f"{adapter.directory} is damaged: {module} lacks a matrix, or has two that do not fit.")
    is_turned = is_embedding or bool(adapter.config.get("fan_in_fan_out"))
    scale = scale_of(adapter.config, module, rank=down.shape[0])
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.num_values != up.shape[0]:
        raise UserError(f"{adapter.directory} is damaged: the magnitude of {module} has another length than its rows.")
    adapter.changes[f"{module}.weight"] = LowRank(down, up, scale, magnitude, is_turned)
    if "lora_B.bias" in tensors:
        adapter.bias_changes[f"{module}.bias"] = (scale, tensors["lora_B.bias"])


def scale_of(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) of rsLoRA (https://arxiv.org/abs/2312.03732), with the module's own alpha."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name, as peft chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
