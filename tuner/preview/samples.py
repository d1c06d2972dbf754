"""Batches as training gets them, in a form to be drawn: packs, their documents, spans of tokens and their marks."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import Batch
from tuner.dataset.sampler import StepPlan
from tuner.dataset.shards import Shards
from tuner.dataset.streaming import StreamedShards
from tuner.errors import UserError
from tuner.preview.characters import Vocabulary, groups, visible


class Span(NamedTuple):
    """Tokens that are drawn as one: most often a single one, else those that share a character."""

    text: str
    ids: tuple[int, ...]
    position: int  # of the first token in its document
    weight: float  # in the loss; 0 where nothing is trained
    special: bool
    cut: int | None = None  # the sequence-parallel rank whose part begins here
    changed: bool = False  # trained with another weight than the span before it, or than 1 behind what is not trained

    @property
    def trained(self) -> bool:
        """Whether a label asks for its tokens."""
        return self.weight > 0


class Tail(NamedTuple):
    """What truncation took from the end of a document; `problem` says why it is not known."""

    ids: tuple[int, ...] = ()
    problem: str = ""


class DocumentView(NamedTuple):
    """A document in its pack; its tokens as ids (tokens,) and weights (tokens,), as they stand in the batch."""

    number: int
    source: str
    start: int  # place of its first token in the pack
    ids: list[int]
    weights: list[float]  # what each token weighs in the loss; 0 where no label asks for it
    tail: Tail | None = None

    @property
    def num_trained(self) -> int:
        """Tokens that the batch asks for as labels."""
        return sum(weight > 0 for weight in self.weights)


class PackView(NamedTuple):
    """A micro-batch: what one forward and backward sees. Steps and micro-batches count from 0."""

    step: int
    epoch: int
    micro_batch: int
    num_micro_batches: int
    num_tokens: int  # padding included
    padding: int
    cuts: tuple[int, ...]  # places in the pack where the parts of sequence-parallel ranks 1, 2, ... begin
    documents: list[DocumentView]


class Excerpt(NamedTuple):
    """A pack, and how many of its documents are shown."""

    pack: PackView
    shown: int


def pack_views(
    plan: StepPlan, batches: Sequence[Batch], shards: Shards | StreamedShards, *, sequence_parallel: int
) -> list[PackView]:
    """The micro-batches of a step; `batches` are what the dataset made of the plan."""
    views = []
    for place, (numbers, batch) in enumerate(zip(plan.packs, batches)):
        edges = batch["cu_seqlens"].tolist()
        ids, weights = batch["input_ids"][0].tolist(), token_weights(batch)
        documents = [
            DocumentView(number, shards.source(number), start, ids[start:end], weights[start:end])
            for number, start, end in zip(numbers, edges, edges[1:])
        ]
        view = PackView(
            step=plan.step,
            epoch=plan.epoch,
            micro_batch=place,
            num_micro_batches=len(batches),
            num_tokens=len(ids),
            padding=len(ids) - edges[len(numbers)],
            cuts=cuts(len(ids), sequence_parallel),
            documents=documents,
        )
        views.append(view)
    return views


def token_weights(batch: Batch) -> list[float]:
    """(T,) what each token weighs in the loss: that of the label one place before it, which asks for it."""
    asked = (batch["labels"][0] != IGNORE_INDEX).float()
    if batch["loss_weights"] is not None:
        asked *= batch["loss_weights"][0]
    return [0.0, *asked[:-1].tolist()]


def cuts(num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    """Where `num_ranks` equal parts of a pack begin, the first aside; the last part is padded where it falls short."""
    part = -(-num_tokens // num_ranks)
    return tuple(range(part, num_tokens, part)) if num_ranks > 1 else ()


def spans(document: DocumentView, vocabulary: Vocabulary, pack_cuts: Sequence[int]) -> Iterator[Span]:
    """The document's tokens in order; a span ends where the weight changes or another rank's part begins."""
    ranks = {place - document.start: rank for rank, place in enumerate(pack_cuts, start=1)}
    weights = document.weights
    changes = {place for place in range(1, len(weights)) if weights[place] != weights[place - 1]}
    for start, end, text, special in groups(document.ids, vocabulary, {*changes, *ranks}):
        before = (weights[start - 1] or 1) if start else 1
        changed = start in {0, *changes} and weights[start] not in (0, before)
        yield Span(text, tuple(document.ids[start:end]), start, weights[start], special, ranks.get(start), changed)


def tail_spans(document: DocumentView, vocabulary: Vocabulary, limit: int) -> Iterator[Span]:
    """The first `limit` tokens that were cut off the document's end."""
    ids = document.tail.ids[:limit] if document.tail else ()
    for start, end, text, special in groups(ids, vocabulary):
        yield Span(text, tuple(ids[start:end]), len(document.ids) + start, 0.0, special)


def heading(document: DocumentView) -> str:
    """One line about a document."""
    counts = f"{counted(len(document.ids), 'token')}, {document.num_trained:,} trained"
    return f"document {document.number} · {visible(document.source)} · {counts}"


def pack_heading(pack: PackView) -> str:
    """One line about a pack."""
    parts = [f"step {pack.step}", f"epoch {pack.epoch}"]
    parts.append(f"micro-batch {pack.micro_batch + 1} of {pack.num_micro_batches}")
    parts.append(f"{counted(len(pack.documents), 'document')} in {counted(pack.num_tokens, 'token')}")
    if pack.cuts:
        parts.append(f"sequence-parallel cuts: {', '.join(map(str, pack.cuts))}")
    return " · ".join(parts)


def notes(pack: PackView, shown: int) -> Iterator[str]:
    """What a pack holds beside the documents that are shown."""
    hidden = pack.documents[shown:]
    if hidden:
        tokens = sum(len(document.ids) for document in hidden)
        yield f"{counted(len(hidden), 'more document')} of this pack, {counted(tokens, 'token')} (-n shows more)"
    if pack.padding:
        yield f"{counted(pack.padding, 'token')} of padding, never trained"


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 document, 1,200 documents."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def steps(dataloader: Any, step: int | None) -> Iterator[tuple[StepPlan, list[Batch]]]:
    """The plan and the batches of one step, or of all of the first epoch; made by the dataset, as for training.

    Raises:
        UserError: a step that the run does not have.
    """
    num_steps = len(dataloader.sampler)
    if step is not None and not 0 <= step < num_steps:
        raise UserError(f"--step {step}: the run has {num_steps:,} steps, counted from 0 to {num_steps - 1:,}.")
    for number in range(num_steps) if step is None else [step]:
        plan = dataloader.sampler.plan(number)
        if step is None and plan.epoch > 0:
            return  # the same documents again
        yield plan, dataloader.dataset[plan]
