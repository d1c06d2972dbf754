"""Documents of a pack to a batch: end to end, labels shifted inside each."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.constants import IGNORE_INDEX
from tuner.dataset.tokenize import Document

PADDING_ID = 0  # any id serves: padding is a document of its own, and none of its labels counts


class Batch(TypedDict):
    """The arguments of every method's `forward`; T tokens in one row."""

    input_ids: Tensor  # (1, T) int64
    labels: Tensor  # (1, T) int64: the next token of the same document, or IGNORE_INDEX
    position_ids: Tensor  # (1, T) int64: from 0 in each document
    cu_seqlens: Tensor  # (documents + 1,) int32: edges of the documents
    max_seqlen: int  # tokens of the longest document
    num_loss_tokens: float  # labels of the whole optimizer step, each counted as it weighs; an int where all weigh 1
    loss_weights: Tensor | None  # (1, T) float32: what each label weighs, 0 where there is none; None where all weigh 1


def collate(documents: Sequence[Document], num_loss_tokens: float, *, pad_to_multiple_of: int = 1) -> Batch:
    """A pack's documents to a batch. Without documents: a batch of padding alone, which adds nothing to the loss."""
    lengths = [len(document.ids) for document in documents]
    padding = num_padding(sum(lengths), pad_to_multiple_of)
    if padding:
        lengths.append(padding)
    edges = np.cumsum([0, *lengths])
    ids = np.full(edges[-1], PADDING_ID, np.int64)
    labels = np.full(edges[-1], IGNORE_INDEX, np.int64)
    for document, start in zip(documents, edges):
        end = start + len(document.ids)
        ids[start:end] = document.ids
        labels[start : end - 1] = np.where(document.trained[1:], ids[start + 1 : end], IGNORE_INDEX)
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        max_seqlen=max(lengths),
        num_loss_tokens=num_loss_tokens,
        loss_weights=_loss_weights(documents, edges, labels),
    )


def collate_packs(
    packs: Sequence[Sequence[int]],
    document: Callable[[int], Document],
    num_loss_tokens: float,
    pad_to_multiple_of: int,
) -> list[Batch]:
    """The micro-batches of a step, whose packs name their documents by number."""
    return [
        collate([document(index) for index in pack], num_loss_tokens, pad_to_multiple_of=pad_to_multiple_of)
        for pack in packs
    ]


def _loss_weights(documents: Sequence[Document], edges: NDArray[np.int64], labels: NDArray[np.int64]) -> Tensor | None:
    """Shifted as the labels are."""
    if all(document.weights is None for document in documents):
        return None
    weights = (labels != IGNORE_INDEX).astype(np.float32)
    for document, start in zip(documents, edges):
        if document.weights is not None:
            weights[start : start + len(document.ids) - 1] *= document.weights[1:]
    return torch.from_numpy(weights)[None]


def num_padding(num_tokens: int, pad_to_multiple_of: int) -> int:
    """Tokens that `collate` adds; a batch is never empty."""
    return -num_tokens % pad_to_multiple_of if num_tokens else pad_to_multiple_of
