"""What a model says of given answers: their log-probability, and whether it would have generated them."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.model.attention_cut import rope_by_longest

Spans = Sequence[tuple[int, int]]


class Recall(NamedTuple):
    """Of all answers of a document: mean log-probability of a token (nats), and the share of answers, all tokens
    of which are the likeliest ones, so that greedy decoding would write them."""

    log_probability: float
    accuracy: float


def packs(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Consecutive indices whose lengths sum to at most `max_tokens`; what is longer stands alone."""
    pack: list[int] = []
    size = 0
    for index, length in enumerate(lengths):
        if pack and size + length > max_tokens:
            yield pack
            pack, size = [], 0
        pack.append(index)
        size += length
    if pack:
        yield pack


@torch.no_grad()
def recall(llm: PreTrainedModel, documents: Sequence[tuple[Sequence[int], Spans]]) -> list[Recall]:
    """Score documents in one pass, packed: none sees another. Logits exist for the answers' tokens only.

    Args:
        llm: in evaluation mode.
        documents: token ids of each, and half-open spans of its answers, none of which begins at 0.
    """
    lengths = [len(ids) for ids, _ in documents]
    if rope_by_longest(llm) is not None and len(documents) > 1:  # a document's angles would depend on its neighbours
        return [scored for document in documents for scored in recall(llm, [document])]
    offsets = list(accumulate(lengths, initial=0))
    places = [offset + i for offset, (_, spans) in zip(offsets, documents) for a, b in spans for i in range(a, b)]
    device = llm.get_input_embeddings().weight.device
    ids = torch.tensor([[token for tokens, _ in documents for token in tokens]], device=device)  # (1, T)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=device),
        "max_seqlen": max(lengths),
        "use_cache": False,
    }
    before = torch.tensor(places, device=device) - 1  # the token before an answer's token foretells it
    logits: Tensor = llm(**batch, logits_to_keep=before).logits[0].float()  # (answers' tokens, V)
    targets = ids[0, before + 1]
    scores = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].tolist()
    hits = (logits.argmax(dim=-1) == targets).tolist()
    found, begin = [], 0
    for _, spans in documents:
        first, right = begin, 0
        for a, b in spans:
            right += all(hits[begin : begin + b - a])
            begin += b - a
        found.append(Recall(sum(scores[first:begin]) / (begin - first), right / len(spans)))
    return found


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
