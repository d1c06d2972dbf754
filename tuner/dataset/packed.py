"""Shards as packs for training: packed anew in each epoch, or endlessly where sources or lengths have shares."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.buckets import Groups, group
from tuner.dataset.collate import Batch, collate_packs
from tuner.dataset.contributions import contributions, contributions_table, share_starts
from tuner.dataset.ledger import Count, Ledger
from tuner.dataset.mixture import Mixture
from tuner.dataset.ordering import IntArray, number_type
from tuner.dataset.packing import Packs, pack, pack_each
from tuner.dataset.sampler import StepPlan
from tuner.dataset.shards import Shards
from tuner.errors import UserError

NUM_CACHED_EPOCHS = 2  # a prefetching worker may still be in the last one


class PackedDataset:
    """Shards whose documents are packed anew each epoch; item: a step's plan -> its micro-batches.

    With `pack=False` each document is a batch of its own. Every batch is padded to a multiple of `pad_to_multiple_of`.
    With `buckets` (most tokens of a document -> share of the tokens) documents of each length have their share, too.
    `num_wanted` are the packs that the run takes, where that is known: shares hold in so many, not in an epoch alone.
    Raises UserError if a document is longer than `max_length`, or if there is none.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        max_length: int,
        seed: int,
        pack: bool = True,
        pad_to_multiple_of: int = 1,
        buckets: Mapping[int, float] | None = None,
        num_wanted: int | None = None,
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
        self._buckets, self._num_wanted = buckets, num_wanted
        self._mixture = self._mixed() if shards.shares or buckets else None
        sizes = self.packs(0).sizes(shards.lengths)
        self.num_packs = len(sizes)
        padding = int((-sizes % pad_to_multiple_of).sum())  # as `num_padding` of each, for none is empty
        drawn = Count(len(self.packs(0).documents), int(sizes.sum())) if self._mixture else Count()
        ledger = replace(shards.ledger, drawn=drawn, packs=self.num_packs, max_length=max_length, padding=padding)
        self.ledger: Ledger = ledger
        """where the tokens went, padding of an epoch included: the same in each, for the sizes of packs are"""
        self.contributions = contributions(shards, self.packs(0))
        """what each source has, and what of it comes in an epoch"""
        if shards.shares:
            print(contributions_table(self.contributions))
        number = ledger.drawn.documents or len(shards)
        print(f"{number:,} documents in {self.num_packs:,} packs of {max_length:,}, {ledger.efficiency:.2%} full")

    @property
    def num_loss_tokens(self) -> IntArray | NDArray[np.float64]:
        """(documents,) labels of each document, each counted as it weighs: floats where some do not weigh 1."""
        return self.shards.num_loss_tokens if self.shards.loss_weight is None else self.shards.loss_weight

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets plans, which name the documents; it needs no packs."""
        return {**self.__dict__, "_epochs": OrderedDict(), "_mixture": None}

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch: a function of (lengths, max_length, seed, epoch)."""
        if epoch not in self._epochs:
            while len(self._epochs) >= NUM_CACHED_EPOCHS:  # before another takes its memory
                self._epochs.popitem(last=False)
            self._epochs[epoch] = self._packed(epoch)
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
    def sizes(self) -> tuple[IntArray, IntArray]:
        """(documents,) tokens and labels of each document of the first epoch."""
        documents = self.packs(0).documents
        return self.shards.lengths[documents], self.shards.num_loss_tokens[documents]

    @property
    def fill(self) -> float:
        """Share of the room of the first epoch's packs that documents fill."""
        return int(self.sizes[0].sum()) / (self.num_packs * self.max_length)

    @property
    def group_names(self) -> list[str]:
        """What has a share of the tokens: sources, or those of a length; all together where nothing has one."""
        return self._groups.names

    @property
    def group_shares(self) -> list[float]:
        """The share of each group that was asked for."""
        return [weight / sum(self._groups.weights) for weight in self._groups.weights]

    @property
    def group_tokens(self) -> list[int]:
        """Tokens that each group has."""
        return np.add.reduceat(self.shards.lengths[self._groups.order], self._groups.starts[:-1]).tolist()

    def groups_of(self, documents: IntArray) -> IntArray:
        """(documents,) the group of each."""
        return self._group_of[documents]

    @cached_property
    def _group_of(self) -> IntArray:
        numbers = np.empty(len(self.shards), np.int64)
        numbers[self._groups.order] = np.repeat(np.arange(len(self._groups.names)), np.diff(self._groups.starts))
        return numbers

    def _packed(self, epoch: int) -> Packs:
        if self._mixture:
            packs = self._mixture.packs(epoch)
            return Packs(self._groups.order[packs.documents], packs.edges) if self._buckets else packs
        seed = (self.seed, epoch)
        return pack(self.shards.lengths, self.max_length, seed) if self.pack else pack_each(self.shards.lengths, seed)

    @cached_property
    def _groups(self) -> Groups:
        """Sources by weight, and their documents by length. Raises UserError for a source or bucket without any."""
        shards, shares, buckets = self.shards, self.shards.shares, self._buckets
        starts = share_starts(shards) if shares else [0, len(shards)]
        names = [share.name for share in shares] or ["all sources"]
        weights = [share.weight for share in shares] or [1.0]
        if not buckets:
            return Groups(np.arange(len(shards), dtype=number_type(len(shards))), starts, weights, names)
        return group(shards.lengths, starts, weights, names, buckets)

    def _mixed(self) -> Mixture:
        """The packs of groups that have shares."""
        order, starts, weights, _ = self._groups
        lengths = self.shards.lengths[order] if self._buckets else self.shards.lengths
        make = partial(Mixture, seed=self.seed, pack=self.pack, num_wanted=self._num_wanted)
        return make(weights, starts, lengths, self.max_length)
