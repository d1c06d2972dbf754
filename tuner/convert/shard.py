"""A model directory with its weights in files of another size, bit for bit the same."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.convert.config_fit import check_config_fits
from tuner.convert.model_files import copy_companions, model_tensors
from tuner.convert.output import check_absent, publishing
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import Origin, check_reload
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import cast, total_bytes


def shard(model: Path, out: Path, *, max_shard_size: int = DEFAULT_SHARD_SIZE, verify: bool = True) -> Path:
    """Write `out`: the files of `model`, its weights in safetensors of at most `max_shard_size` bytes.

    Raises:
        UserError: no model directory, a damaged one, one whose config does not fit, or something in `out` already.
        RuntimeError: what was written differs; it is not published.
    """
    check_absent(out)
    tensors = model_tensors(model)
    check_config_fits(tensors, model)
    pieces = [cast(tensor) for tensor in tensors.values()]
    checks = Checks()
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        copy_companions(model, draft)
        digests = write_shards(draft, pieces, max_shard_size=max_shard_size)
        check_reload(origin_of(model), draft, digests, checks, verify=verify)
        write_record(draft, "shard", {"model": model.name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def origin_of(model: Path) -> Origin:
    """The directory itself, to compare one that was made from it with."""
    return Origin(settings=model, tensors=partial(loaded_tensors, model), model=partial(load, model))


def load(model: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def loaded_tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values, as safetensors itself reads them."""
    for name, tensor in model_tensors(model).items():
        with safe_open(tensor.path, framework="pt") as file:
            yield name, file.get_tensor(name)
