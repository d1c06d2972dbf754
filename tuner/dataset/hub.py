"""Datasets of the Hugging Face hub, `hub:NAME[:CONFIG][:SPLIT]`: fetched once, kept as a Parquet file ever after."""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tuner.dataset.cache import build_once
from tuner.demo.files import cache_root
from tuner.errors import UserError

PREFIX = "hub:"
FORM = "hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT"
FILE = "rows.parquet"


class HubName(NamedTuple):
    """What to load: a name on the hub or a local directory, one of its configs (None: its only one), a split."""

    name: str
    config: str | None
    split: str


def parse(text: str) -> HubName:
    """`hub:owner/name:en:test` -> its parts; the split is `train` where none is given. Raises UserError for others."""
    parts = text.removeprefix(PREFIX).split(":")
    if not all(parts) or len(parts) > 3:
        raise UserError(f"{text!r} is no name of a dataset. Expected: {FORM}.")
    config = parts[1] if len(parts) == 3 else None
    return HubName(parts[0], config, parts[-1] if len(parts) > 1 else "train")


def fetch(text: str) -> Path:
    """The Parquet file of a dataset's split, made at first use. Raises UserError if it cannot be had."""
    name = parse(text)
    words = re.sub(r"[^\w.-]+", "-", text.removeprefix(PREFIX))[-80:]
    digest = hashlib.sha256("\0".join([name.name, name.config or "", name.split]).encode()).hexdigest()[:16]
    directory = cache_root() / "hub" / f"{words}-{digest}"
    if not _is_whole(directory):
        build_once(directory, partial(_write, name=name, text=text), _is_whole)
        print(f"{text}: kept in {directory}; remove that to fetch it again", flush=True)
    return directory / FILE


def _is_whole(directory: Path) -> bool:
    return (directory / FILE).is_file()  # the directory appears once it is whole


def _write(directory: Path, *, name: HubName, text: str) -> None:
    dataset = _load(name, text)
    if not hasattr(dataset, "to_parquet"):
        raise UserError(f"{text} gives no table but a {type(dataset).__name__}. Name one split: {FORM}.")
    dataset.to_parquet(str(directory / FILE))


def _load(name: HubName, text: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{text}: datasets of the hub need the datasets package: pip install tuner[data]") from error
    try:
        return load_dataset(name.name, name.config, split=name.split)
    except Exception as error:  # the package raises its own, the hub client's, pyarrow's and the network's
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        raise UserError(
            f"{text} could not be fetched ({reason[:300]}). Check the name, the config, the split and the network; "
            "a private set needs HF_TOKEN. Without a network, name a local file instead."
        ) from error
