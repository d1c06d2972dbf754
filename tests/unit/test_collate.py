"""Collate: the architecture's batch, with labels that never look into another document."""

import numpy as np
import pytest
import torch

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import collate
from tuner.dataset.tokenize import Document

KEYS = {"input_ids", "labels", "position_ids", "cu_seqlens", "max_seqlen", "num_loss_tokens", "loss_weights"}


def documents_of(*lengths: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(1, 90_000, n).astype(np.uint32), rng.random(n) < 0.5) for n in lengths]


def slow_labels(documents: list[Document], padding: int) -> list[int]:
    """Token by token: the next token of the same document if it is trained."""
    labels = []
    for document in documents:
        for place in range(len(document.ids)):
            following = place + 1
            known = following < len(document.ids) and document.trained[following]
            labels.append(int(document.ids[following]) if known else IGNORE_INDEX)
    return labels + [IGNORE_INDEX] * padding


@pytest.mark.parametrize("lengths", [(5,), (1,), (2, 1, 7), (1, 1, 1), (64, 3, 61)])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_batches_equal_a_loop_over_single_tokens(lengths, multiple):
    documents = documents_of(*lengths)
    batch = collate(documents, 12, pad_to_multiple_of=multiple)
    padding = -sum(lengths) % multiple
    padded = [*lengths, padding] if padding else list(lengths)
    ids = [token for document in documents for token in document.ids.tolist()]
    assert set(batch) == KEYS
    assert batch["input_ids"].tolist() == [ids + [0] * padding]
    assert batch["labels"].tolist() == [slow_labels(documents, padding)]
    assert batch["position_ids"].tolist() == [[place for length in padded for place in range(length)]]
    assert batch["cu_seqlens"].tolist() == [sum(padded[:n]) for n in range(len(padded) + 1)]
    assert (batch["max_seqlen"], batch["num_loss_tokens"]) == (max(padded), 12)
    assert batch["loss_weights"] is None


def test_types_are_those_of_the_architecture():
    batch = collate(documents_of(3, 4), 5)
    assert {key: batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), torch.int64
    )
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].dim() == 1
    assert type(batch["max_seqlen"]) is int
    assert type(batch["num_loss_tokens"]) is int


@pytest.mark.parametrize("multiple", [1, 64])
def test_weights_stand_where_their_labels_stand_and_are_0_elsewhere(multiple):
    """Token by token; the second document has none of its own, so its labels weigh 1."""
    documents = documents_of(5, 7, 1, 9)
    rng = np.random.default_rng(1)
    given = [rng.random(len(document.ids)).astype(np.float32) + 1 for document in documents]
    weighted = [d if i == 1 else d._replace(weights=given[i]) for i, d in enumerate(documents)]
    batch = collate(weighted, 12.5, pad_to_multiple_of=multiple)
    expected = []
    for index, document in enumerate(documents):
        for place in range(1, len(document.ids) + 1):
            is_label = place < len(document.ids) and document.trained[place]
            expected.append(float(given[index][place] if index != 1 else 1) if is_label else 0.0)
    expected += [0.0] * (-len(expected) % multiple)
    assert batch["loss_weights"].tolist() == [expected]
    assert batch["loss_weights"].dtype == torch.float32
    assert torch.equal(batch["loss_weights"] > 0, batch["labels"] != IGNORE_INDEX)
    assert torch.equal(batch["labels"], collate(documents, 12, pad_to_multiple_of=multiple)["labels"])
    assert batch["num_loss_tokens"] == 12.5


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_micro_batch_without_documents_has_tokens_but_no_label(multiple):
    batch = collate([], 40, pad_to_multiple_of=multiple)
    assert batch["input_ids"].shape == (1, multiple)
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["cu_seqlens"].tolist() == [0, multiple]
    assert batch["num_loss_tokens"] == 40
    assert batch["loss_weights"] is None


def test_cutting_a_batch_anywhere_loses_no_label():
    """Labels are shifted before any cut, so the pieces of a sequence-parallel cut hold all of them."""
    documents = documents_of(9, 14)
    labels = collate(documents, 1)["labels"][0]
    asked = int(sum(document.trained[1:].sum() for document in documents))
    for cut in range(1, len(labels)):
        assert sum(int((piece != IGNORE_INDEX).sum()) for piece in (labels[:cut], labels[cut:])) == asked
