"""Which process this is among those of a run, as launchers say it in the environment, and the group they form."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from tuner.errors import UserError
from tuner.failures import note

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPENING = timedelta(days=7)
"""for the first rank to open its store: until then it may prepare data that others have"""
ANSWERING = timedelta(minutes=1)
"""for a store that a launcher has opened before it started the ranks"""


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


ALONE = World()


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun, or a launcher that sets the same variables, says of this process.

    Raises:
        UserError: only some of the variables are there, or they contradict each other.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return ALONE
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


def own_device(world: World) -> torch.device:
    """The GPU that is this process's own, or the CPU where there is none."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def joined(world: World, device: torch.device, *, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Hold the process group of all ranks; nothing for a world of one.

    Call it after whatever takes long and needs nobody else, such as tokenising: it waits for all ranks however long
    they take, and `timeout` counts from then on. What stops this rank is noted before its connections close.

    Raises:
        UserError: the place where the ranks meet is not given, cannot be reached, or its port is in use.
    """
    if world.size == 1:
        yield
        return
    store = meeting_place(world)
    wait_for_all(store, world)
    dist.init_process_group(
        BACKENDS[device.type], store=store, rank=world.rank, world_size=world.size, timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    try:
        yield
    except Exception as error:
        note(error)
        raise  # without a goodbye: destroying the group may wait for ranks that wait for this one
    else:
        dist.destroy_process_group()


def meeting_place(world: World, environment: Mapping[str, str] = os.environ) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT; the first rank opens it, unless the launcher has done so.

    Raises:
        UserError: the address is missing, cannot be reached, or its port is in use.
    """
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{world.size} processes need MASTER_ADDR and MASTER_PORT (a number) to meet, which launchers set. "
            "Start with `tuner train CONFIG --nproc N` or under torchrun."
        ) from error
    is_launchers = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens, timeout = world.is_first and not is_launchers, ANSWERING if is_launchers else OPENING
    try:
        store = dist.TCPStore(host, port, None, opens, timeout, wait_for_workers=False, multi_tenant=opens)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(why_no_store(host, port, opens=opens)) from error
    return dist.PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def why_no_store(host: str, port: int, *, opens: bool) -> str:
    """What to say where the store of a run could not be opened, or not be reached."""
    if opens:
        return (
            f"Port {port} on {host} cannot be opened; most often another run uses it. End that run, or choose another "
            "port: --master HOST:PORT (MASTER_PORT under other launchers); on one node leave it out for a free one."
        )
    return (
        f"{host}:{port}, where the processes meet, does not answer. Has the first node started, is "
        "this its address, and does a firewall let this port through?"
    )


def wait_for_all(store: dist.Store, world: World, *, patience: float = 15.0) -> None:
    """Return when all ranks have come here; every `patience` seconds a line says who has not."""
    store.set(f"here_{world.rank}", "")
    store.add("num_here", 1)
    started = said = time.monotonic()
    while store.add("num_here", 0) < world.size:
        time.sleep(0.05 if time.monotonic() - started < 5 else 0.5)
        if time.monotonic() - said > patience:
            said = time.monotonic()
            missing = [rank for rank in range(world.size) if not store.check([f"here_{rank}"])]
            print(f"waiting for the ranks {in_ranges(missing)} to be ready, {said - started:.0f} s", flush=True)


def in_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5."""
    ends = [number for number in numbers if number + 1 not in numbers]
    starts = [number for number in numbers if number - 1 not in numbers]
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends))
