"""Ids that a sample brings along, as the document they are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.formats.fields import require
from tuner.dataset.messages import RowError, Sample
from tuner.dataset.rendering import LEAST_WEIGHT, MOST_WEIGHT
from tuner.dataset.tokenize import Document


def given_document(sample: Sample, num_ids: int) -> Document:
    """The document of a sample that is tokenised: {"ids", "trained"?, "weights"?}, lists of the same length.

    `trained` says which ids have loss (all, where it is missing), `weights` what the loss of those counts. Raises
    RowError for ids that the tokenizer (of `num_ids`) lacks, and for anything but such lists.
    """
    ids = _array(sample["ids"], "ids", "iu").astype(np.int64)
    trained = np.ones(len(ids), np.bool_)
    if sample.get("trained") is not None:
        trained = _array(sample["trained"], "trained", "b", len(ids))
    require(ids.min(initial=0) >= 0, "ids from 0 up", int(ids.min(initial=0)))
    largest = int(ids.max(initial=0))
    if largest >= num_ids:
        raise RowError(
            f"Expected ids below {num_ids:,}, as the tokenizer has them, got {largest:,} at place {ids.argmax()}. "
            "Was the row made with another tokenizer?"
        )
    return Document(ids.astype(np.uint32), trained, _weights(sample, trained))


def _weights(sample: Sample, trained: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """(tokens,) what each trained token weighs, 1 where nothing is trained; None where all of them weigh 1."""
    if sample.get("weights") is None:
        return None
    weights = np.where(trained, _array(sample["weights"], "weights", "fiu", len(trained)), 1)
    right = (weights >= LEAST_WEIGHT) & (weights <= MOST_WEIGHT)
    require(bool(right.all()), f"weights from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}", weights[~right][:1].tolist())
    return None if (weights == 1).all() else weights.astype(np.float32)


def _array(values: Any, name: str, kinds: str, length: int | None = None) -> NDArray[Any]:
    """A flat array of values of these kinds (of numpy's letters); RowError for anything else, or another length."""
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths in it
        array = np.empty((0, 0))
    what = {"b": "true and false", "iu": "integers", "fiu": "numbers"}[kinds]
    flat = array.ndim == 1 and (array.dtype.kind in kinds or array.size == 0)
    require(flat, f"{name!r} of the sample to be a list of {what}", values)
    require(length in (None, len(array)), f"as many {name!r} as ids", [length, len(array)])
    return array.astype(np.bool_) if kinds == "b" else array
