"""What ranks tell each other once a step, in one exchange: counts that add up, times to compare, a wish to stop."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tuner.engine.together import sum_over_ranks
from tuner.engine.world import World


class Own(NamedTuple):
    """Of one rank, in one step; what shares a sequence has the same counts of tokens."""

    loss: float  # its part of the step's
    num_loss_tokens: float
    num_tokens: float
    sum_squared_lengths: float
    data_seconds: float
    wait_seconds: float
    memory_bytes: float
    stop: float = 0.0  # a signal's number, or what else asks this rank to end the run; 0 for nothing


class Tally(NamedTuple):
    """Of all ranks, in one step."""

    loss: float
    num_loss_tokens: int
    num_tokens: int
    sum_squared_lengths: int
    imbalance: float  # the largest sum of squared lengths of a rank, over the ranks' mean
    data_seconds: float  # the largest
    wait_seconds: float  # the ranks' mean
    least_wait_seconds: float  # of the rank that waits least: what is left to it is communication
    memory_bytes: int  # the largest
    memory_rank: int  # which rank's that is
    stop: int = 0  # the largest
    stop_rank: int = 0  # which rank's that is
    nonfinite_ranks: tuple[int, ...] = ()  # whose part of the loss is NaN or infinite


def gather_rows(own: Own, loss: torch.Tensor, world: World) -> torch.Tensor:
    """(ranks, numbers) float64: a row of `Own` for each rank.

    Args:
        own: of this rank; its loss is taken from `loss`.
        loss: (), on the device that ranks exchange from, so that nobody waits for it yet.
    """
    table = torch.zeros(world.size, len(own), dtype=torch.float64, device=loss.device)
    table[world.rank] = torch.tensor(own, dtype=torch.float64, device=loss.device)
    table[world.rank, 0] = loss
    return sum_over_ranks(table, world)


def tally(values: Sequence[float], num_sharing: int) -> Tally:
    """The sums and extremes of a table of `gather_rows`, row after row; `num_sharing` ranks share a sequence."""
    columns = {name: values[place :: len(Own._fields)] for place, name in enumerate(Own._fields)}
    squares, waits, memory = (columns[name] for name in ("sum_squared_lengths", "wait_seconds", "memory_bytes"))
    stops = columns["stop"]
    return Tally(
        loss=sum(columns["loss"]),
        num_loss_tokens=round(sum(columns["num_loss_tokens"]) / num_sharing),
        num_tokens=round(sum(columns["num_tokens"]) / num_sharing),
        sum_squared_lengths=round(sum(squares) / num_sharing),
        imbalance=max(squares) * len(squares) / sum(squares) if any(squares) else 1.0,
        data_seconds=max(columns["data_seconds"]),
        wait_seconds=sum(waits) / len(waits),
        least_wait_seconds=min(waits),
        memory_bytes=int(max(memory)),
        memory_rank=memory.index(max(memory)),
        stop=int(max(stops)),
        stop_rank=stops.index(max(stops)),
        nonfinite_ranks=tuple(rank for rank, loss in enumerate(columns["loss"]) if not math.isfinite(loss)),
    )
