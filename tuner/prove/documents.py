"""A step's worth of the user's own documents, shortened to what a CPU can do, and packed as the config says."""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tuner.dataset.collate import Batch, collate_packs
from tuner.dataset.packing import Packs, pack, pack_each
from tuner.dataset.sampler import StepPlan
from tuner.dataset.tokenize import Document
from tuner.engine.assemble import Assembly
from tuner.errors import UserError
from tuner.parallel.mesh import Degrees
from tuner.parallel.sequence import held_tokens
from tuner.prove.small_model import NUM_TOKEN_IDS

LENGTHS = (2.4, 0.35, 1.0, 0.6, 0.1)  # of documents, as shares of what the user gives: cuts fall anywhere in them
PACK_LENGTHS = 4  # that many such lengths have room in a pack
OWN, LAST = "own", "last"
PLACEMENTS = {OWN: "the tokens that your config trains", LAST: "the tokens of the last shard of each pack alone"}


def build_data(config: Any) -> DataLoader:
    """The config's dataloader for one rank, prepared as training does it; what it prints stays unsaid."""
    with redirect_stdout(StringIO()):
        return Assembly(config).build(config.train_dataloader)


def in_order(dataloader: DataLoader) -> Iterator[int]:
    """The numbers of the documents in the order in which one rank trains them."""
    return (index for plan in dataloader.sampler for documents in plan.packs for index in documents)


def short_documents(dataloader: DataLoader, num_tokens: int, *, length: int, most: int | None = None) -> list[Document]:
    """The first documents of training, each shortened to some of LENGTHS x `length`, until they have `num_tokens`.

    There may be fewer, and are at most `most`.
    What is left of a document lies around where its training begins. Token ids are those of the small model.
    """
    documents: list[Document] = []
    left = num_tokens
    for index, share in zip(islice(in_order(dataloader), most), cycle(LENGTHS)):
        document = shorten(dataloader.dataset.shards.document(index), max(2, round(share * length)))
        documents.append(document)
        left -= len(document.ids)
        if left <= 0:
            break
    return documents


def shorten(document: Document, num_tokens: int) -> Document:
    """At most `num_tokens` of a document, its first trained token and some before that among them."""
    first = int(document.trained[1:].argmax()) + 1
    start = max(0, min(first - max(1, num_tokens // 4), len(document.ids) - num_tokens))
    kept = slice(start, start + num_tokens)
    weights = None if document.weights is None else document.weights[kept]
    return Document(document.ids[kept] % NUM_TOKEN_IDS, document.trained[kept], weights)


class Step(NamedTuple):
    """A dataset of one epoch and one step, for a sampler to plan and for ranks to take their batches from."""

    documents: list[Document]
    layout: Packs

    @property
    def num_packs(self) -> int:
        """Packs of the step."""
        return len(self.layout)

    @property
    def num_loss_tokens(self) -> NDArray[np.float64]:
        """(documents,) labels of each, counted as they weigh."""
        counts = [
            document.trained[1:].sum() if document.weights is None else document.weights[1:][document.trained[1:]].sum()
            for document in self.documents
        ]
        return np.array(counts, np.float64)

    def packs(self, epoch: int) -> Packs:
        """Of any epoch."""
        return self.layout

    def batches(self, plan: StepPlan, num_parts: int) -> list[Batch]:
        """The micro-batches of a rank, padded so that so many ranks can share each."""
        return collate_packs(plan.packs, self.documents.__getitem__, plan.num_loss_tokens, num_parts)


def make_step(documents: Sequence[Document], max_length: int, *, packed: bool) -> Step:
    """Documents in packs of at most `max_length`, by the packing of training."""
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    layout = pack(lengths, max_length, (0, 0)) if packed else pack_each(lengths, (0, 0))
    step = Step(list(documents), layout)
    if not step.num_loss_tokens.sum() > 0:
        raise UserError("None of the shortened documents has a trained token. Give more of each: --tokens 256.")
    return step


def train_last_shard(step: Step, degrees: Degrees) -> Step:
    """The same documents with other labels: those that the last rank of a sequence holds, and no others."""
    documents = list(step.documents)
    for number in range(step.num_packs):
        members = step.layout[number].tolist()
        [batch] = collate_packs([members], step.documents.__getitem__, 1, degrees.size)
        is_held = np.zeros(batch["input_ids"].shape[1], bool)
        is_held[held_tokens(batch["cu_seqlens"], degrees, degrees.size - 1).numpy()] = True
        for index, start in zip(members, batch["cu_seqlens"].tolist()):
            ids = documents[index].ids
            trained = np.concatenate([[False], is_held[start : start + len(ids) - 1]])
            documents[index] = Document(ids, trained)
    return Step(documents, step.layout)


def num_shared(step: Step, degrees: Degrees) -> int:
    """Documents whose tokens lie on more than one rank."""
    return sum(_num_shared_of_pack(step, number, degrees) for number in range(step.num_packs))


def _num_shared_of_pack(step: Step, number: int, degrees: Degrees) -> int:
    members = step.layout[number].tolist()
    [batch] = collate_packs([members], step.documents.__getitem__, 1, degrees.size)
    owner = np.empty(batch["input_ids"].shape[1], np.int64)
    for rank in range(degrees.size):
        owner[held_tokens(batch["cu_seqlens"], degrees, rank).numpy()] = rank
    edges = batch["cu_seqlens"].tolist()
    return sum(len(set(owner[start:end])) > 1 for start, end in pairwise(edges[: len(members) + 1]))
