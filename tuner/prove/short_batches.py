"""A dataset's own packs with most of each left out, so that a proof about a run need not wait for its tokens."""

from itertools import pairwise
from typing import Any

import numpy as np

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import Batch, collate
from tuner.dataset.sampler import StepPlan
from tuner.dataset.tokenize import Document

NUM_DOCUMENTS = 4  # of a pack that stay
LENGTH = 24  # tokens of each that stay, at most


class ShortBatches:
    """Another dataset in all that is asked of it, but for the batches: they have a part of their documents' tokens.

    Of each document it is a part that begins shortly before the first trained token. The loss stays divided by the
    labels of the whole step.
    """

    def __init__(self, dataset: Any, *, pad_to_multiple_of: int = 1) -> None:
        self.dataset = dataset
        self.pad_to_multiple_of = pad_to_multiple_of

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet: another process is unpickling this one
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, plan: StepPlan) -> list[Batch]:
        """One batch per micro-batch of the plan."""
        return [shorten(batch, self.pad_to_multiple_of) for batch in self.dataset[plan]]


def shorten(batch: Batch, pad_to_multiple_of: int) -> Batch:
    """The first documents of a batch, a part of each."""
    edges = batch["cu_seqlens"].tolist()
    documents = [part(batch, start, end) for start, end in list(pairwise(edges))[:NUM_DOCUMENTS]]
    return collate(documents, batch["num_loss_tokens"], pad_to_multiple_of=pad_to_multiple_of)


def part(batch: Batch, start: int, end: int) -> Document:
    """Up to LENGTH tokens of the document that lies at [start, end) of a batch."""
    is_label = batch["labels"][0, start:end].numpy() != IGNORE_INDEX
    begin = start + max(0, min(int(is_label.argmax()) - LENGTH // 4, end - start - LENGTH))
    end = min(begin + LENGTH, end)
    labels = batch["labels"][0, begin : end - 1].numpy()
    weights = batch["loss_weights"]
    return Document(
        batch["input_ids"][0, begin:end].numpy(),
        np.concatenate([[False], labels != IGNORE_INDEX]),
        None if weights is None else np.concatenate([[0.0], weights[0, begin : end - 1].numpy()]),
    )
