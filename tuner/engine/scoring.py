"""Documents scored token by token, packed, by all ranks of a run together or by one process alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import collate
from tuner.dataset.tokenize import Document
from tuner.engine.replicated import Replicated
from tuner.engine.strategy import Strategy
from tuner.engine.together import sum_over_ranks
from tuner.method.sft import SFT
from tuner.parallel.sequence import cut, held_tokens


class Scores(NamedTuple):
    """Of the n trained tokens of a document but its first, which nothing foretells; in their order."""

    places: NDArray[np.int64]  # (n,) in the document, from 1
    losses: NDArray[np.float64]  # (n,) -log probability in nats
    hits: NDArray[np.bool_]  # (n,) the likeliest token, which greedy decoding would write


def alone(method: SFT) -> Strategy:
    """This process with a model that is where and what it is to be; it can score, and not be trained."""
    strategy = Replicated(precision="fp32")
    strategy.model = method
    return strategy


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


def score_documents(
    strategy: Strategy, lengths: Sequence[int], document: Callable[[int], Document], max_tokens: int
) -> Iterator[tuple[int, Scores]]:
    """The number of each document and its scores, the same on all ranks; all of them call it alike, within `aside`.

    As in training, ranks that share a sequence each hold a part of a pack, and others take other packs. Every pack is
    a phase of its own to those who watch for ranks that hang.

    Args:
        lengths: of the documents, in tokens.
        document: by number; each rank asks for those of all ranks, so it must say the same on each.
        max_tokens: in a pack; a longer document stands alone.
    """
    num_parts = strategy.mesh.degrees.size
    num_places, own = strategy.world.size // num_parts, strategy.world.rank // num_parts
    if strategy.model.rope_by_longest is not None:
        max_tokens = 1  # each document alone: its angles would depend on its neighbours
    pending = list(packs(lengths, max_tokens))
    for first in range(0, len(pending), num_places):
        strategy.progress.enter(strategy.progress.place.phase)
        turn = pending[first : first + num_places]
        documents = [[document(number) for number in pack] for pack in turn]
        places = [[scored_places(each) for each in pack] for pack in documents]
        sizes = [sum(map(len, pack)) for pack in places]
        table = torch.zeros(sum(sizes), 2, dtype=torch.float64, device=strategy.device)
        mine = documents[own] if own < len(turn) else []  # who has no pack computes with the others all the same
        begin = sum(sizes[:own])
        fill(table[begin : begin + sum(sizes[own : own + 1])], strategy, mine)
        values = sum_over_ranks(table, strategy.world).cpu().numpy()
        numbers = [number for pack in turn for number in pack]
        begin = 0
        for number, found in zip(numbers, [found for pack in places for found in pack]):
            losses, hits = values[begin : begin + len(found)].T
            yield number, Scores(found, losses, hits > 0)
            begin += len(found)


def scored_places(document: Document) -> NDArray[np.int64]:
    """Of the tokens that have a label."""
    return np.flatnonzero(document.trained[1:]) + 1


def fill(table: Tensor, strategy: Strategy, documents: Sequence[Document]) -> None:
    """Put into the rows of `table`, (labels, 2), what this rank finds of a pack: its share, zeros elsewhere."""
    degrees, rank = strategy.mesh.degrees, strategy.mesh.sequence.rank
    plain = [Document(each.ids, each.trained) for each in documents]
    batch: dict[str, Any] = dict(collate(plain, 1, pad_to_multiple_of=degrees.size))
    is_label = batch["labels"][0] != IGNORE_INDEX
    rows = is_label.cumsum(0) - 1  # of each token that has a label
    held = held_tokens(batch["cu_seqlens"], degrees, rank)
    own = rows[held[is_label[held]]].to(table.device)
    part = {
        name: value.to(strategy.device) if isinstance(value, Tensor) else value
        for name, value in cut(batch, degrees, rank).items()
    }
    with torch.no_grad(), strategy.generation():
        found = strategy.model(**part, mode="scores")
    table[own, 0] = found["losses"].double()
    table[own, 1] = found["hits"].double()
