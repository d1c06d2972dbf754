"""Tensors by the names and in the parts that model files have, where transformers joins or renames them as it loads."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from tuner.convert.tensors import BLOCK_SIZE, Piece, StoredTensor, cast, fit
from tuner.errors import UserError


def published(tensors: Mapping[str, StoredTensor], settings: Path, dtype: torch.dtype | None) -> list[Piece]:
    """What to write of a model whose loaded form has these tensors: mostly the same, of mixtures of experts each one.

    Args:
        tensors: by the names of the loaded model.
        settings: directory with its config.json.
        dtype: of what is written; None keeps that of the tensors.

    Raises:
        UserError: the files' form cannot be made from one tensor at a time.
    """
    config = AutoConfig.from_pretrained(settings, trust_remote_code=False)
    if get_checkpoint_conversion_mapping(config.model_type) is None:
        return [cast(tensor, dtype) for tensor in tensors.values()]
    llm = hollow(config)
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    parts = {name: revert_weight_conversion(llm, {name: shape}) for name, shape in shapes.items()}
    whole = revert_weight_conversion(llm, shapes)
    if {key: part.shape for of_one in parts.values() for key, part in of_one.items()} != {
        key: part.shape for key, part in whole.items()
    }:
        raise UserError(f"{config.model_type} cannot be written tensor by tensor: its files join what training parts.")
    pieces = []
    for name, of_one in parts.items():
        is_whole = len(of_one) == 1
        for key, part in of_one.items():
            renamed = is_whole and part.shape == tensors[name].shape
            pieces.append(cast(tensors[name], dtype, key) if renamed else part_of(tensors[name], key, part, llm, dtype))
    return pieces


def part_of(
    tensor: StoredTensor, key: str, part: torch.Tensor, llm: PreTrainedModel, dtype: torch.dtype | None
) -> Piece:
    """One of several tensors that a loaded one becomes."""
    target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    def blocks() -> Iterator[torch.Tensor]:
        values = parts_of(tensor, llm)[key].flatten()
        for first in range(0, len(values), BLOCK_SIZE):
            yield fit(values[first : first + BLOCK_SIZE], target, key)

    return Piece(key, target, tuple(part.shape), blocks)


@lru_cache(maxsize=1)
def parts_of(tensor: StoredTensor, llm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Views of the loaded tensor, which is whole in memory while they are written."""
    return revert_weight_conversion(llm, {tensor.name: tensor.whole()})


def published_tensors(tensors: Mapping[str, torch.Tensor], settings: Path) -> dict[str, torch.Tensor]:
    """All of a model's tensors at once in their files' form, as save_pretrained makes it."""
    config = AutoConfig.from_pretrained(settings, trust_remote_code=False)
    if get_checkpoint_conversion_mapping(config.model_type) is None:
        return dict(tensors)
    return revert_weight_conversion(hollow(config), dict(tensors))


def hollow(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, which transformers asks for its rules."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
