"""From rows on disk to packed batches: the calls that a config makes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tuner.dataset.collate import Batch, collate_packs, num_padding
from tuner.dataset.contributions import contributions, contributions_table, share_starts
from tuner.dataset.group_signals import obey_parent_only
from tuner.dataset.ledger import Count, Ledger
from tuner.dataset.mixture import Mixture
from tuner.dataset.packing import IntArray, Packs, pack, pack_each
from tuner.dataset.prepare import build_shards
from tuner.dataset.sampler import StepPlan, StepSampler
from tuner.dataset.shards import Shards
from tuner.dataset.streaming import StreamedDataset, build_stream
from tuner.errors import UserError

__all__ = ["PackedDataset", "StreamedDataset", "build_dataloader", "build_shards", "build_stream"]

NUM_CACHED_EPOCHS = 2  # a prefetching worker may still be in the last one


class PackedDataset:
    """Shards whose documents are packed anew each epoch; item: a step's plan -> its micro-batches.

    With `pack=False` each document is a batch of its own. Every batch is padded to a multiple of `pad_to_multiple_of`.
    Raises UserError if a document is longer than `max_length`, or if there is none.
    """

    def __init__(
        self, shards: Shards, *, max_length: int, seed: int, pack: bool = True, pad_to_multiple_of: int = 1
    ) -> None:
        if not len(shards):
            raise UserError("There are no documents to pack. Check data_path and the token ledger.")
        if shards.lengths.max() > max_length:
            raise UserError(
                f"A document has {shards.lengths.max()} tokens, over max_length={max_length} of the packs. "
                "Give the shards and the packs the same max_length."
            )
        self.shards = shards
        self.max_length, self.seed, self.pack = max_length, seed, pack
        self.pad_to_multiple_of = pad_to_multiple_of
        self._epochs: OrderedDict[int, Packs] = OrderedDict()
        self._mixture = self._mixed() if shards.shares else None
        sizes = self.packs(0).sizes(shards.lengths)
        self.num_packs = len(sizes)
        padding = sum(num_padding(size, pad_to_multiple_of) for size in sizes.tolist()) if pad_to_multiple_of > 1 else 0
        drawn = Count(len(self.packs(0).documents), int(sizes.sum())) if self._mixture else Count()
        ledger = replace(shards.ledger, drawn=drawn, packs=self.num_packs, max_length=max_length, padding=padding)
        self.ledger: Ledger = ledger
        """where the tokens went, padding of an epoch included: the same in each, for the sizes of packs are"""
        self.contributions = contributions(shards, self.packs(0))
        """what each source has, and what of it comes in an epoch"""
        if self._mixture:
            print(contributions_table(self.contributions))
        number = ledger.drawn.documents or len(shards)
        print(f"{number:,} documents in {self.num_packs:,} packs of {max_length:,}, {ledger.efficiency:.2%} full")

    @property
    def num_loss_tokens(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """(documents,) labels of each document, each counted as it weighs: floats where some do not weigh 1."""
        return self.shards.num_loss_tokens if self.shards.loss_weight is None else self.shards.loss_weight

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets plans, which name the documents; it needs no packs."""
        return {**self.__dict__, "_epochs": OrderedDict(), "_mixture": None}

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch: a function of (lengths, max_length, seed, epoch)."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._packed(epoch)
            while len(self._epochs) > NUM_CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def __getitem__(self, plan: StepPlan) -> list[Batch]:
        """One batch per micro-batch of the plan."""
        return collate_packs(plan.packs, self.shards.document, plan.num_loss_tokens, self.pad_to_multiple_of)

    def document_ids(self, plan: StepPlan) -> list[str]:
        """The `file:line` of every document of a step, to find what went wrong in it."""
        return [self.shards.source(index) for documents in plan.packs for index in documents]

    def fingerprint(self, packs: Sequence[Sequence[int] | IntArray]) -> str:
        """Hash over all documents that the numbers in a step's packs may mean."""
        return self.shards.fingerprint

    @property
    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(documents,) tokens and labels of each document of the first epoch."""
        documents = self.packs(0).documents
        return self.shards.lengths[documents], self.shards.num_loss_tokens[documents]

    def _packed(self, epoch: int) -> Packs:
        if self._mixture:
            return self._mixture.packs(epoch)
        seed = (self.seed, epoch)
        return pack(self.shards.lengths, self.max_length, seed) if self.pack else pack_each(self.shards.lengths, seed)

    def _mixed(self) -> Mixture:
        """The packs of weighted sources. Raises UserError for a source that has no document left."""
        shards, weights = self.shards, [share.weight for share in self.shards.shares]
        return Mixture(weights, share_starts(shards), shards.lengths, self.max_length, seed=self.seed, pack=self.pack)


def build_dataloader(
    dataset: PackedDataset | StreamedDataset,
    *,
    num_accumulation_steps: int,
    num_epochs: int = 1,
    max_steps: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> "DataLoader[list[Batch]]":
    """A loader of list[Batch], one list per optimizer step; its `.sampler` is the StepSampler, to seek and to ask."""
    sampler = StepSampler(
        dataset,
        num_accumulation_steps=num_accumulation_steps,
        num_epochs=num_epochs,
        max_steps=max_steps,
        rank=rank,
        num_ranks=num_ranks,
    )
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=obey_parent_only,
    )


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    """`collate` has been called; torch's default would copy."""
    return batches
