"""base.json beside an adapter: the base it was trained on, by fingerprint, and in how many bits that was held."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.model.adapter import BASE_NOTE
from tuner.model.directory import inside
from tuner.model.fingerprint import Base

KEYS = ("weights", "fingerprint", "seed")


def read_base_note(directory: Path, *more: str) -> dict[str, Any]:
    """What is noted of the base, with the keys `more` besides KEYS; empty beside an adapter that peft has written.

    Raises:
        UserError: the note is damaged.
    """
    path = inside(directory, BASE_NOTE)
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {key: note[key] for key in (*KEYS, *more)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}). Copy the adapter again.") from error


def check_base(adapter: Path, base: str, note: Mapping[str, Any], named: Any) -> None:
    """Refuse a base whose tensors are not those that the adapter was trained on, where that is known.

    Args:
        adapter: directory, for the message.
        base: a directory, or a name on the hub that has been fetched.
        note: as `read_base_note` gives it.
        named: the base that adapter_config.json names.

    Raises:
        UserError: its fingerprint is another.
    """
    if note and Base(base, note["weights"], note["seed"]).fingerprint() != note["fingerprint"]:
        raise UserError(
            f"{adapter} is an adapter for another base than {base}: names and shapes fit, the values of its tensors "
            f"are not those of training. It was trained on {named}."
        )
