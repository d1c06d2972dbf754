"""Ids that a sample brings along, as the document they are."""

import numpy as np

from tuner.dataset.formats.fields import require
from tuner.dataset.messages import RowError, Sample
from tuner.dataset.tokenize import Document


def given_document(sample: Sample, num_ids: int) -> Document:
    """The document of a sample that is tokenised. Raises RowError for ids that the tokenizer (of `num_ids`) lacks."""
    ids = np.array(sample["ids"], np.int64)
    trained = np.array(sample.get("trained", [True] * len(ids)), np.bool_)
    require(ids.ndim == 1 and ids.shape == trained.shape, "as many marks as ids", [len(ids), len(trained)])
    require(ids.min(initial=0) >= 0, "ids from 0 up", int(ids.min(initial=0)))
    largest = int(ids.max(initial=0))
    if largest >= num_ids:
        raise RowError(
            f"Expected ids below {num_ids:,}, as the tokenizer has them, got {largest:,} at place {ids.argmax()}. "
            "Was the row made with another tokenizer?"
        )
    return Document(ids.astype(np.uint32), trained)
