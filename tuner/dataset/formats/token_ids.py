"""Rows that are tokenised already: ids, and which of them have loss."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, require
from tuner.dataset.messages import RowError
from tuner.dataset.rendering import LEAST_WEIGHT, MOST_WEIGHT, is_loss

NO_LOSS = -100  # of labels, as transformers and torch write it
MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks")
WEIGHED = "loss_mask"  # the one of them whose entries may be weights; the others are yes or no where they come from
WEIGHTS = f"0 and 1, or weights from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"


def tokens(row: Row) -> dict[str, Any]:
    """{"tokens": [...]}, negative ids without loss; or {"input_ids": [...], "labels" or "loss_mask"?: [...]}.

    `labels` has the id itself where there is loss and -100 elsewhere, not shifted; a mask has 1 and 0, or in
    `loss_mask` what a token's loss weighs: 0.5 halves it. With neither, every token has loss. Token 0 of `tokens`
    always has loss, for it cannot be negative.
    """
    if "tokens" in row:
        require("input_ids" not in row, "either 'tokens' or 'input_ids' in the row", sorted(map(str, row)))
        signed = _integers(row, "tokens")
        return {"ids": [abs(token) for token in signed], "trained": [token >= 0 for token in signed]}
    ids = _integers(row, "input_ids")
    lowest = min(ids)
    require(lowest >= 0, "'input_ids' to hold no negative id (those go into 'tokens')", lowest)
    _check_unpadded(row, ids)
    marks = _marks(row, ids)
    sample = {"ids": ids, "trained": [mark != 0 for mark in marks]}
    weighed = any(mark not in (0, 1) for mark in marks)
    return {**sample, "weights": [mark or 1 for mark in marks]} if weighed else sample


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


def _marks(row: Row, ids: list[int]) -> list[bool | int | float]:
    """What each token weighs in the loss, 0 for none."""
    given = [key for key in MASKS if row.get(key) is not None]
    if not given:
        return [True] * len(ids)
    require(len(given) == 1, f"one of {MASKS} in the row", given)
    key = given[0]
    marks = field(row, key, list)
    if len(marks) != len(ids):
        raise RowError(f"Expected {key!r} to have an entry for each of the {len(ids)} input_ids, it has {len(marks)}.")
    if key == "labels":
        _check_labels(marks, ids)
        return [mark != NO_LOSS for mark in marks]
    allowed = WEIGHTS if key == WEIGHED else "0 and 1"
    wrong = next((place for place, mark in enumerate(marks) if not _is_mark(mark, key)), None)
    require(wrong is None, f"{key!r} to hold {allowed}, at place {wrong}", wrong if wrong is None else marks[wrong])
    return marks


def _is_mark(mark: Any, key: str) -> bool:
    return mark in (0, 1) or (key == WEIGHED and is_loss(mark))


def _check_labels(labels: list[Any], ids: list[int]) -> None:
    wrong = next((place for place, label in enumerate(labels) if label not in (NO_LOSS, ids[place])), None)
    if wrong is not None:
        shifted = all(label in (NO_LOSS, token) for label, token in zip(labels, ids[1:]))
        why = " They look shifted by one; give them as they stand over the ids." if shifted and len(ids) > 1 else ""
        raise RowError(
            f"Expected 'labels' to be the id itself or {NO_LOSS}, got {labels[wrong]!r} at place {wrong}, "
            f"where the id is {ids[wrong]}.{why}"
        )
