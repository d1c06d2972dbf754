"""A checkpoint that is read: the tensors of all ranks by name, and whether its files are those that were saved."""

import json
import re
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.convert.sharding import INDEX
from tuner.convert.tensors import StoredTensor, stored_tensors
from tuner.dataset.cache import hash_file
from tuner.engine.checkpoint import damaged, read_manifest
from tuner.engine.tensor_files import WEIGHTS, file_name
from tuner.engine.world import World
from tuner.errors import UserError

UNREAD = ("optimizer", "rng")
"""files of a checkpoint that begin so say nothing of the model; the optimizer's are twice as large as it"""


def verify_read_files(checkpoint: Path) -> None:
    """Compare the bytes of all files that a conversion reads with the manifest's sha256.

    Raises:
        UserError: naming the first that differs.
    """
    for name, entry in read_manifest(checkpoint)["files"].items():
        if not name.startswith(UNREAD) and hash_file(checkpoint / name) != entry["sha256"]:
            raise damaged(checkpoint / name, "its bytes have another sha256 than the manifest says")


def checkpoint_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """The trained tensors of all ranks by name, layer 2 before layer 10; none is read.

    Raises:
        UserError: the files of a rank are missing, or one is damaged.
    """
    paths = sorted(checkpoint.glob(f"{WEIGHTS}-*-of-*.safetensors"))
    expected = [file_name(WEIGHTS, World(rank, len(paths))) for rank in range(len(paths))]
    if not paths or [path.name for path in paths] != expected:
        raise UserError(f"{checkpoint} is no whole checkpoint: of {WEIGHTS}-*.safetensors it has {len(paths)} files.")
    found = {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}
    return dict(sorted(found.items(), key=lambda item: in_order_of_layers(item[0])))


def in_order_of_layers(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The dtype in which the checkpoint holds its weights."""
    return next(iter(checkpoint_tensors(checkpoint).values())).dtype


def companions(checkpoint: Path) -> list[Path]:
    """The files of the checkpoint's `hf` directory that its manifest knows; a file put there later is not one."""
    return [checkpoint / name for name in read_manifest(checkpoint)["files"] if Path(name).parent == Path("hf")]


def load_trained(checkpoint: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model as it was trained, in `dtype` or in that of the weights, from what lies in the checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        for path in [*(checkpoint / "hf").iterdir(), *checkpoint.glob("model-*.safetensors")]:
            (Path(name) / path.name).symlink_to(path.resolve())
        files = {tensor.name: tensor.path.name for tensor in checkpoint_tensors(checkpoint).values()}
        (Path(name) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or stored_dtype(checkpoint), use_safetensors=True, trust_remote_code=False
        )
