"""What a model says of given answers: their log-probability, and whether it would have generated them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

Spans = Sequence[tuple[int, int]]


class Recall(NamedTuple):
    """Of all answers of a document: mean log-probability of a token (nats), and the share of answers, all tokens
    of which are the likeliest ones, so that greedy decoding would write them."""

    log_probability: float
    accuracy: float


def marked(num_tokens: int, spans: Spans) -> NDArray[np.bool_]:
    """(tokens,) which of them belong to answers."""
    marks = np.zeros(num_tokens, np.bool_)
    for begin, end in spans:
        marks[begin:end] = True
    return marks


def recall(spans: Spans, losses: NDArray[np.float64], hits: NDArray[np.bool_]) -> Recall:
    """Of a document whose answers' tokens, in their order, have these losses (nats) and are the likeliest or not.

    Args:
        spans: half-open and in order, none of which is empty or begins at 0.
    """
    edges = np.cumsum([0, *(end - begin for begin, end in spans)])
    right = [bool(hits[begin:end].all()) for begin, end in pairwise(edges)]
    return Recall(-float(losses.mean()), sum(right) / len(right))


@torch.no_grad()
def generated(llm: PreTrainedModel, document: tuple[Sequence[int], Spans]) -> float:
    """The share of answers that greedy generation with a cache writes, each after the true text before it."""
    ids, spans = document
    device = llm.get_input_embeddings().weight.device
    right = 0
    for begin, end in spans:
        inputs = torch.tensor([list(ids[:begin])], device=device)
        made = llm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=end - begin,
            min_new_tokens=end - begin,
            do_sample=False,
        )
        right += made[0, begin:].tolist() == list(ids[begin:end])
    return right / len(spans)
