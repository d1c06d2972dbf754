"""A model directory that is read: its weights by the names in its index, inside it, and the files that go with them."""

import json
import shutil
from pathlib import Path

from tuner.convert.record import RECORD
from tuner.convert.sharding import INDEX, SINGLE
from tuner.convert.tensors import StoredTensor, stored_tensors
from tuner.errors import UserError
from tuner.model.directory import check_inside, check_model_directory, check_weights, inside

NOT_COPIED = (RECORD, "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
"""what is not copied beside converted weights: it would be that of the old ones"""


def model_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory by name, file after file; their values stay on the disk.

    Raises:
        UserError: it is no model directory, has only pickles, or its index names what is not inside it or not so.
    """
    check_model_directory(str(directory))
    files = index_of(directory)
    for name in set(files.values()):
        check_inside(directory, name)
    check_weights(str(directory))
    if not files:
        return stored_tensors(inside(directory, SINGLE))
    found = {file: stored_tensors(inside(directory, file)) for file in dict.fromkeys(files.values())}
    wrong = [f"{name} is not in {file}" for name, file in files.items() if name not in found[file]]
    if wrong:
        raise UserError(
            f"{directory / INDEX} does not fit its files: {'; '.join(wrong[:5])}"
            f"{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Copy the directory again."
        )
    return {name: tensor for file in sorted(found) for name, tensor in found[file].items() if files.get(name) == file}


def index_of(directory: Path) -> dict[str, str]:
    """Tensor name -> file name as the index says; empty where all tensors are in one file."""
    path = directory / INDEX
    if (directory / SINGLE).exists() or not path.exists():
        return {}
    try:
        files = json.loads(inside(directory, INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no index of weights: {error!r}. Copy it again.") from error
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{path} is no index of weights: its weight_map must name a file for each tensor.")
    return files


def copy_companions(source: Path, out: Path) -> None:
    """Config, tokenizer and whatever else lies beside the weights; neither weights nor directories."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(inside(source, path.name), out / path.name)
