"""Rows that are tokenised already: ids, and which of them have loss."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, require
from tuner.dataset.messages import RowError

NO_LOSS = -100  # of labels, as transformers and torch write it
MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks")


def tokens(row: Row) -> dict[str, Any]:
    """{"tokens": [...]}, negative ids without loss; or {"input_ids": [...], "labels" or "loss_mask"?: [...]}.

    `labels` has the id itself where there is loss and -100 elsewhere, not shifted; a mask has 1 and 0. With neither,
    every token has loss. Token 0 of `tokens` always has loss, for it cannot be negative.
    """
    if "tokens" in row:
        require("input_ids" not in row, "either 'tokens' or 'input_ids' in the row", sorted(map(str, row)))
        signed = _integers(row, "tokens")
        return {"ids": [abs(token) for token in signed], "trained": [token >= 0 for token in signed]}
    ids = _integers(row, "input_ids")
    lowest = min(ids)
    require(lowest >= 0, "'input_ids' to hold no negative id (those go into 'tokens')", lowest)
    _check_unpadded(row, ids)
    return {"ids": ids, "trained": _trained(row, ids)}


TOKENS_EXAMPLE = {"input_ids": [1, 333, 352, 2], "loss_mask": [0, 0, 1, 1]}


def _integers(row: Row, key: str) -> list[int]:
    values: list[int] = field(row, key, list)
    require(bool(values), f"{key!r} to hold at least one token", values)
    kinds = set(map(type, values))
    if kinds != {int}:
        place = next(place for place, value in enumerate(values) if type(value) is not int)
        require(False, f"{key!r} to hold integers, at place {place}", values[place])
    return values


def _check_unpadded(row: Row, ids: list[int]) -> None:
    """Padding, and several documents in one row, would be trained as text."""
    attention = row.get("attention_mask")
    if attention is not None and (not isinstance(attention, list) or attention != [1] * len(ids)):
        raise RowError("Expected an 'attention_mask' of ones, one a token: padding is left out of the row. Got others.")
    positions = row.get("position_ids")
    if positions is not None and positions != list(range(len(ids))):
        raise RowError("Expected 'position_ids' from 0 up, got others: give each document a row of its own.")


def _trained(row: Row, ids: list[int]) -> list[bool]:
    given = [key for key in MASKS if row.get(key) is not None]
    if not given:
        return [True] * len(ids)
    require(len(given) == 1, f"one of {MASKS} in the row", given)
    key = given[0]
    marks = field(row, key, list)
    if len(marks) != len(ids):
        raise RowError(f"Expected {key!r} to have an entry for each of the {len(ids)} input_ids, it has {len(marks)}.")
    if key != "labels":
        wrong = next((mark for mark in marks if mark not in (0, 1)), None)
        require(wrong is None, f"{key!r} to hold 0 and 1", wrong)
        return [bool(mark) for mark in marks]
    wrong_place = next((place for place, mark in enumerate(marks) if mark not in (NO_LOSS, ids[place])), None)
    if wrong_place is not None:
        shifted = all(mark in (NO_LOSS, token) for mark, token in zip(marks, ids[1:]))
        why = " They look shifted by one; give them as they stand over the ids." if shifted and len(ids) > 1 else ""
        raise RowError(
            f"Expected 'labels' to be the id itself or {NO_LOSS}, got {marks[wrong_place]!r} at place {wrong_place}, "
            f"where the id is {ids[wrong_place]}.{why}"
        )
    return [mark != NO_LOSS for mark in marks]
