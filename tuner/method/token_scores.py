"""What a model says of each given token, without gradients: its loss, and whether it is the likeliest."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tuner.constants import IGNORE_INDEX
from tuner.method.loss import CHUNK_TOKENS


class TokenScores(NamedTuple):
    """Of n labels, in their order."""

    losses: Tensor  # (n,) -log probability in nats; fp32, or fp64 where the logits are
    hits: Tensor  # (n,) bool: the likeliest token, which greedy decoding would write


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenScores:
    """Scores by `hidden @ weight.T`, chunk by chunk: the logits of a batch never exist at once.

    Args:
        hidden: (T, H).
        weight: (V, H), the output embedding.
        labels: (T,) int64, already shifted, `IGNORE_INDEX` where nothing is scored.
    """
    scored = (labels != IGNORE_INDEX).nonzero().flatten()
    parts = [scores_of(nn.functional.linear(hidden[rows], weight), labels[rows]) for rows in scored.split(CHUNK_TOKENS)]
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts)))


def scores_of(logits: Tensor, labels: Tensor) -> TokenScores:
    """(n, V), (n,) -> the scores of n labels, all of which count."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.gather(1, labels[:, None])[:, 0]
    return TokenScores(logits.logsumexp(dim=1) - own, logits.argmax(dim=1) == labels)
