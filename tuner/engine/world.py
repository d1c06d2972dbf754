"""Which process this is among those of a run, as launchers say it in the environment, and the group they form."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from tuner.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class World(NamedTuple):
    """This process among those of a run; one process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its node
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.rank == 0


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun, or a launcher that sets the same variables, says of this process.

    Raises:
        UserError: only some of the variables are there, or they contradict each other.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return World()
    missing = [name for name in VARIABLES if name not in given]
    wrong = [f"{name}={text!r}" for name, text in given.items() if not text.isdecimal()]
    if missing or wrong:
        raise UserError(
            f"This looks like one of several processes, but of {', '.join(VARIABLES)} "
            f"{f'these are missing: {chr(44).join(missing)}' if missing else f'these are no numbers: {wrong}'}. "
            "Start with `tuner train CONFIG --nproc N` or under torchrun, or unset RANK and WORLD_SIZE."
        )
    rank, size, local_rank, local_size = (int(given[name]) for name in VARIABLES)
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size} "
                        "contradict each other. Start the processes with torchrun.")  # fmt: skip
    return World(rank, size, local_rank, local_size)


@contextmanager
def joined(world: World, device: torch.device, *, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Hold the process group of all ranks; nothing for a world of one.

    Call it after whatever takes long and needs nobody else, such as tokenising: `timeout` counts from here.
    """
    if world.size == 1:
        yield
        return
    dist.init_process_group(
        BACKENDS[device.type], rank=world.rank, world_size=world.size, timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()
