"""The helper that runs tests on several ranks shows whose fault it was."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_on_ranks


def sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the culprit")
    dist.barrier()


def vanish() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(30)


def test_every_rank_answers():
    assert run_on_ranks(2, sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_the_rank_that_failed_first_is_shown_and_the_others_do_not_hang():
    with pytest.raises(RankError, match=r"rank 1 failed:(?s:.*)ValueError: the culprit"):
        run_on_ranks(2, fail_on_one)


def test_a_rank_that_vanishes_is_named():
    with pytest.raises(RankError, match="rank 1 failed:\nit ended without a word"):
        run_on_ranks(2, vanish)
