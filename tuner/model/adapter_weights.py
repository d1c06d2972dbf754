"""The tensors of a model with an adapter by name: the base's from where they are, the adapter's as they begin."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.model.hollow import parameter_places

BLOCK = 64
"""values that share a scale in NF4; the scales are 8 bits, 256 of which share one in fp32"""


class AttachedWeights(Mapping[str, Tensor]):
    """A model's parameters and persistent buffers by the names that they have once an adapter is in it.

    Args:
        llm: with the adapter; only shapes are read.
        base: the base's tensors by the names that they had before.
        seed: of the A's.
    """

    def __init__(self, llm: PreTrainedModel, base: Mapping[str, Tensor], *, seed: int) -> None:
        self._base, self._seed = base, seed
        self._own = {name: weight.shape for name, weight in llm.named_parameters() if ".lora_" in name}
        self._is_quantised = {name for name, weight in llm.named_parameters() if is_four_bit(weight)}
        others = (name for name, _ in (*llm.named_parameters(), *llm.named_buffers()) if name not in self._own)
        self._names = {name: base_name(name) for name in others}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._own:
            return self._base[self._names.get(name, name)]
        if ".lora_A." in name:
            return draw(name, self._own[name], self._seed)
        if ".lora_B." in name:
            return torch.zeros(self._own[name])
        return self._row_lengths(f"{name.partition('.lora_magnitude_vector.')[0]}.base_layer.weight")

    def _row_lengths(self, name: str) -> Tensor:
        """(outputs,) of the base's weight as it computes: DoRA begins with them."""
        weight = self[name].float()
        if name in self._is_quantised:
            weight = dequantised(quantised(weight))
        return torch.linalg.norm(weight, dim=1)

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._own

    def __len__(self) -> int:
        return len(self._names) + len(self._own)


def base_name(name: str) -> str:
    """What a tensor was called before its module became an adapter's `base_layer`."""
    return name.replace(".base_layer.", ".").removeprefix("base_layer.")


def draw(name: str, shape: torch.Size, seed: int) -> Tensor:
    """(rank, inputs) fp32, uniform in +-1/sqrt(inputs), as peft draws A; the same wherever and whenever it is asked."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


def fill(llm: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put each tensor in its place on the CPU, one after the other: fp32, or 4 bits where the place is for these."""
    places = parameter_places(llm)
    for name, [(module, leaf), *others] in places.items():
        place = getattr(module, leaf)
        value = weights[name].to(torch.float32)
        parameter = quantised(value) if is_four_bit(place) else nn.Parameter(value, requires_grad=place.requires_grad)
        for owner, attribute in ((module, leaf), *others):
            setattr(owner, attribute, parameter)
    computed = {name for name, _ in llm.named_non_persistent_buffers()}
    for name, buffer in list(llm.named_buffers()):
        if name not in computed:
            parent, _, leaf = name.rpartition(".")
            llm.get_submodule(parent).register_buffer(leaf, weights[name].to(buffer.dtype))


def bitsandbytes() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import bitsandbytes as package
    except ImportError as error:
        raise UserError("4-bit weights and 8-bit optimizers need bitsandbytes: pip install 'tuner[qlora]'") from error
    return package


def quantise_linear(wrapper: nn.Module) -> None:
    """Let the frozen layer inside an adapter's be one of 4 bits, which gets its weight later."""
    linear = wrapper.base_layer
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        made = bitsandbytes().nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
    if linear.bias is not None:
        made.bias = linear.bias
    # On CPUs with bf16 arithmetic it would repack its weight in evaluation mode, and have no gradient from then on.
    made.support_avx512bf16_for_cpu = False
    wrapper.base_layer = made


def is_four_bit(weight: Tensor) -> bool:
    """Whether a weight is bitsandbytes', quantised or to be."""
    return hasattr(weight, "quant_state")


def quantised(weight: Tensor) -> nn.Parameter:
    """NF4, whose scales are quantised too: 4.13 bits a value."""
    made = bitsandbytes().nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, quant_type="nf4")
    return made.to(weight.device)


def dequantised(weight: Any) -> Tensor:
    """(outputs, inputs), the numbers that 4 bits stand for."""
    return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
