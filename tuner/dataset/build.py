"""From rows on disk to packed batches: the calls that a config makes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from tuner.dataset.collate import Batch
from tuner.dataset.group_signals import obey_parent_only
from tuner.dataset.packed import PackedDataset
from tuner.dataset.prepare import build_shards
from tuner.dataset.sampler import StepSampler
from tuner.dataset.staged import StageDatasets, StagedDataset, StageShards
from tuner.dataset.streaming import StreamedDataset, build_stream

__all__ = [
    "PackedDataset",
    "StageDatasets",
    "StageShards",
    "StreamedDataset",
    "build_dataloader",
    "build_shards",
    "build_stream",
]


def build_dataloader(
    dataset: PackedDataset | StreamedDataset | StageDatasets,
    *,
    stages: Sequence[Mapping[str, Any]] | None = None,
    num_accumulation_steps: int,
    num_epochs: int = 1,
    max_steps: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> "DataLoader[list[Batch]]":
    """A loader of list[Batch], one list per optimizer step; its `.sampler` is the StepSampler, to seek and to ask.

    `stages` are for StageDatasets, and there must be some (see `stages.Stage`).
    Raises UserError for counts and stages that make no run.
    """
    data: PackedDataset | StreamedDataset | StagedDataset
    if isinstance(dataset, StageDatasets):
        data = dataset.staged(stages or (), max_steps, num_accumulation_steps * num_ranks)
        data.tell_idle(num_ranks)
    else:
        data = dataset
    sampler = StepSampler(
        data,
        num_accumulation_steps=num_accumulation_steps,
        num_epochs=num_epochs,
        max_steps=max_steps,
        rank=rank,
        num_ranks=num_ranks,
    )
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=obey_parent_only,
    )


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    """`collate` has been called; torch's default would copy."""
    return batches
