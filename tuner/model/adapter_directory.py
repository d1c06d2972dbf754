"""Adapter directories as peft writes them: what one may hold before peft reads it, and where its base is said to be."""

import json
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.model.directory import ADAPTER, inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
KINDS = ("LORA",)  # with DoRA and rsLoRA, which are settings of it
CODE_KEYS = ("megatron_config",)
"""by which peft would import a module that the file names"""


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (path / ADAPTER).is_file()


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The settings of an adapter, of a kind that is known and without what would import code.

    Raises:
        UserError: it is no adapter, is not JSON, or asks for more than a LoRA.
    """
    path = inside(directory, ADAPTER)
    if not path.is_file():
        raise UserError(f"{directory} holds no adapter: it has no {ADAPTER}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Copy the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") not in KINDS:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path} is of the kind {kind!r}; what is loaded is {', '.join(KINDS)}.")
    if asked := [key for key in CODE_KEYS if config.get(key)]:
        raise UserError(f"{path} sets {', '.join(asked)}, by which a module that it names would be imported. Take it "
                        "out if the adapter does not need it.")  # fmt: skip
    return config


def check_adapter_weights(directory: Path) -> Path:
    """The file of an adapter's weights. Raises UserError where there is none, or only a pickle."""
    path = inside(directory, ADAPTER_WEIGHTS)
    if not path.is_file():
        pickled = " A .bin is a pickle, which runs code when opened." if list(directory.glob("*.bin")) else ""
        raise UserError(f"{directory} has no {ADAPTER_WEIGHTS}; only safetensors are read.{pickled}")
    return path
