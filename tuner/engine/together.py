"""What all ranks of a run decide together: whether each of them succeeded, and sums over them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tuner.engine.world import World


class PeerError(RuntimeError):
    """Another rank failed at what all of them must do; that rank says why."""


def gather_objects(value: Any, world: World) -> list[Any]:
    """A small value of every rank, in the order of the ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any, world: World) -> Any:
    """What the first rank has."""
    return gather_objects(value, world)[0]


@contextmanager
def all_or_none(world: World, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """If the block fails on one rank, it fails on all: there with the error itself, on the others as a `PeerError`.

    The block must not wait for other ranks: they may have failed already.
    """
    error: Exception | None = None
    try:
        yield
    except failures as failure:
        error = failure
    reports = gather_objects(None if error is None else f"{type(error).__name__}: {error}", world)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise PeerError(failed[0])


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """`values` summed over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values
