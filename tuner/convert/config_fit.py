"""Whether weights fit a config.json: shapes by name, against the model that it describes, of which none is made."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.convert.tensors import Rows
from tuner.errors import UserError
from tuner.model.build import read_config
from tuner.model.hollow import stored_names


def check_config_fits(tensors: Mapping[str, Rows], directory: Path) -> None:
    """Refuse tensors of other shapes than the directory's config says.

    Names are not compared: files may have others than the loaded model, which transformers knows how to change.

    Raises:
        UserError: listing those that differ, or saying why the config is none of a causal language model.
    """
    expected = stored_names(hollow_model(directory))
    if problems := other_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected):
        raise UserError(f"The weights of {directory} do not fit its config.json: {listed(problems)}.")


def hollow_model(directory: Path) -> PreTrainedModel:
    """The causal LM of a directory's config, without weights. Raises UserError as `read_config` does."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(str(directory)), trust_remote_code=False)


def other_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which of those that both have differ, in words."""
    return [
        f"{name} is {tuple(found[name])}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]


def listed(problems: list[str]) -> str:
    """The first five, and how many more."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
