"""Full weights as the numbers that QLoRA trained with: put into 4 bits and taken out of them again."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from tuner.convert.tensors import StoredTensor
from tuner.model.adapter_weights import dequantised, quantised


@dataclass(frozen=True)
class Requantised:
    """A stored weight whose values are those of its NF4 form; one such is whole in memory while it is written."""

    stored: StoredTensor
    compute_dtype: torch.dtype | None
    """in which training used the values"""

    @property
    def name(self) -> str:
        """Of the tensor in its model."""
        return self.stored.name

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weight, in which it is written."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.stored.shape

    def row_ranges(self) -> list[tuple[int, int]]:
        """Where blocks of rows begin and end."""
        return self.stored.row_ranges()

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(last - first, ...) of its rows."""
        return values_of(self)[first:last]

    def blocks(self) -> Iterator[torch.Tensor]:
        """All of its values."""
        for first, last in self.row_ranges():
            yield self.rows(first, last).to(self.dtype)


@lru_cache(maxsize=1)
def values_of(tensor: Requantised) -> torch.Tensor:
    """(rows, columns) in the compute dtype; of the tensor that is being written, and no other."""
    return dequantised(quantised(tensor.stored.whole().float())).to(tensor.compute_dtype or torch.float32)


def requantise_module(llm: nn.Module, name: str, compute_dtype: torch.dtype | None = None) -> None:
    """Let a weight of a model, by its name, have the values of its NF4 form, as they are computed with."""
    weight = llm.get_parameter(name)
    weight.data = dequantised(quantised(weight.data.float())).to(compute_dtype or weight.dtype).to(weight.dtype)
