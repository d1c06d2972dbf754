"""How long the documents of a config are, where an earlier run has left them tokenised; nothing is made for it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tuner.dataset.build import PackedDataset, build_shards
from tuner.dataset.fingerprint import digest
from tuner.dataset.hub import PREFIX as HUB
from tuner.dataset.prepare import Preparation, choose_preparations
from tuner.dataset.reading.stamps import stamp
from tuner.dataset.shards import is_whole
from tuner.dataset.sources import parse_entry, read_record, record_path
from tuner.demo.files import PREFIX as DEMO
from tuner.engine.assemble import Assembly
from tuner.errors import UserError


class Lengths(NamedTuple):
    """What a plan takes from the lengths of documents, or assumes of them."""

    mean: float  # sum of squared lengths over sum of lengths: of the document that a mean token stands in
    longest_pack: int  # tokens
    source: str  # of both, for a person


def lengths_of(config: Any, max_length: int) -> Lengths:
    """Of the shards of a config, if all of them are in the cache; else each pack is taken for one document."""
    assumed = Lengths(
        max_length,
        max_length,
        "each pack taken as one document of max_length, the most it can cost; `tuner prepare` finds the real ones",
    )
    dataset = config.train_dataloader["dataset"]
    shards = dataset.get("shards") or {}
    if dataset.get("type") is not PackedDataset or shards.get("type") is not build_shards:
        return assumed
    try:
        directories = list(made_shards(config, shards))
    except (UserError, OSError, ValueError):  # whatever is wrong with them, training says
        return assumed
    lengths = np.concatenate([np.fromfile(path / "lengths.bin", np.uint32) for path in directories]).astype(np.float64)
    if not len(lengths):
        return assumed
    longest = min(max_length, int(lengths.sum() if dataset.get("pack", True) else lengths.max()))
    mean = float((lengths**2).sum() / lengths.sum())
    return Lengths(mean, longest, f"from the {len(lengths):,} documents that are tokenised in the cache")


def made_shards(config: Any, shards: Mapping[str, Any]) -> Iterator[Path]:
    """The directories of a config's shards, as `build_shards` would open them; only looked at.

    Raises:
        UserError: one has not been made yet, or settings and files are such that none can be.
    """
    path = shards["path"]
    for entry in [path] if isinstance(path, (str, Mapping)) else path:
        if any(name.startswith((HUB, DEMO)) for name in parse_entry(entry).paths):
            raise UserError("files that would first be fetched or made")
    if not Path(os.path.expanduser(shards["tokenizer"]["path"])).is_dir():
        raise UserError("a tokenizer that would first be fetched")
    defaults = {"too_long": "truncate", "on_bad_row": "raise", "cache_dir": None}
    built = {name: Assembly(config).build(node) for name, node in shards.items() if name != "type"}
    _, preparations = choose_preparations(**{**defaults, **built})
    for files, preparation in preparations:
        for file in files:
            yield made_shard(preparation, file)


def made_shard(preparation: Preparation, file: Path) -> Path:
    """The directory of one file's shard; UserError where there is none that is as new as the file."""
    record = read_record(record_path(preparation.cache_dir, file))
    known = record.get("ingredients")
    if known is None or record.get("stamp") != list(stamp(file)):
        raise UserError(f"{file} is not tokenised yet")
    directory = preparation.cache_dir / digest({**known, **preparation.settings, **preparation.fixed})
    if not is_whole(directory):
        raise UserError(f"{file} is not tokenised yet")
    return directory
