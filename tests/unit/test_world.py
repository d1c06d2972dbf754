"""Which process this is, where all meet, and that they run the same thing."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from tuner.engine.sameness import differences
from tuner.engine.world import World, in_ranges, joined, meeting_place, read_world, wait_for_all
from tuner.errors import UserError
from tuner.train import compare_run


def variables(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: str(number) for name, number in zip(names, (rank, size, local_rank, local_size))}


def test_who_this_is():
    assert read_world({}) == World()
    assert read_world(variables(9, 16, 1, 8)) == World(9, 16, 1, 8)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (variables(2, 2, 0, 2), "RANK=2, WORLD_SIZE=2, .* contradict each other"),
        (variables(1, 4, 3, 2), "LOCAL_RANK=3, LOCAL_WORLD_SIZE=2 contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "these are missing: LOCAL_RANK,LOCAL_WORLD_SIZE"),
        ({**variables(0, 2, 0, 2), "RANK": "first"}, "these are no numbers: .*RANK='first'"),
    ],
)
def test_variables_that_make_no_sense(environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        read_world(environment)


def test_a_world_of_one_needs_no_group():
    with joined(World(), torch.device("cpu")):
        assert not dist.is_initialized()


def test_no_place_to_meet():
    with pytest.raises(UserError, match="2 processes need MASTER_ADDR and MASTER_PORT"):
        meeting_place(World(0, 2, 0, 2), {"MASTER_ADDR": "localhost"})
    with pytest.raises(UserError, match="2 processes need MASTER_ADDR and MASTER_PORT"):
        meeting_place(World(0, 2, 0, 2), {"MASTER_ADDR": "localhost", "MASTER_PORT": "http"})


def test_a_rank_waits_for_those_that_still_prepare_and_says_for_whom(capsys: pytest.CaptureFixture):
    store = dist.HashStore()
    late = threading.Thread(target=lambda: [time.sleep(0.6), wait_for_all(store, World(1, 2))])
    late.start()
    wait_for_all(store, World(0, 2), patience=0.2)
    late.join()
    assert "waiting for the ranks 1 to be ready" in capsys.readouterr().out


def test_numbers_in_ranges():
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_what_differs_is_named_with_ranks_and_hosts():
    same = {"torch": "2.13", "config": "a1"}
    facts = [same, same, {**same, "config": "b2"}, same]
    assert differences(["one", "one", "two", "two"], facts) == [
        "config: a1 on ranks 0-1, 3 (one, two); b2 on rank 2 (two)"
    ]
    assert differences(["one", "two"], [same, same]) == []


def dataset(fingerprint: str) -> Any:
    """A stand-in for a PackedDataset."""
    return SimpleNamespace(shards=SimpleNamespace(fingerprint=fingerprint))


def compare(size: int) -> list[str]:
    """What a training says that begins with other shards, or with another config."""
    rank = dist.get_rank()
    compare_run("lr = 1", {"lr": 1}, SimpleNamespace(dataset=dataset("abc")), World(rank, size))
    said = []
    for lr, shards in [(1, f"made by {rank}"), (rank, "abc")]:
        try:
            compare_run(f"lr = {lr}", {"lr": lr}, SimpleNamespace(dataset=dataset(shards)), World(rank, size))
        except UserError as error:
            said.append(str(error))
    return said


def test_ranks_with_other_shards_or_configs_stop_all_with_one_message():
    first, second = run_on_ranks(2, compare, 2)
    assert first == second
    assert "The ranks do not run the same thing:\n  - data: made by 0 on rank 0 (" in first[0]
    assert "The ranks do not run the same thing:\n  - config: " in first[1]
    assert "\n  - setting lr: 0 on rank 0 (" in first[1]
