"""Where memory ran out: which step and phase, and what was allocated there, told as one message."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from tuner.engine.machine import peak_memory
from tuner.engine.strategy import Strategy
from tuner.errors import UserError
from tuner.failures import where

GIB = 2**30
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class Shortage(NamedTuple):
    """Facts of a rank that got no more memory, for a person."""

    place: str
    problem: str  # what the allocator says
    allocated: str


class OutOfMemoryError(UserError):
    """A rank got no more memory; the message says where, and what may be set to need less."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory, of a GPU or of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )


@contextmanager
def shortage_told(strategy: Strategy, explain: Callable[[Shortage], str]) -> Iterator[None]:
    """Tell a shortage of memory inside as `explain` has it.

    Raises:
        OutOfMemoryError: in place of what an allocator raised.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        place = strategy.progress.place
        text = str(error).strip().partition("\n")[0].partition("If reserved but unallocated")[0].strip()
        problem = f"{type(error).__name__}: {text}".removesuffix(": ")
        told = explain(Shortage(where(place.step, place.phase), problem, allocated(strategy.device)))
        raise OutOfMemoryError(told) from error


def allocated(device: torch.device) -> str:
    """What this process holds: on a GPU by torch's count, on a CPU what is resident."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        now, most, reserved = (
            stats[name] / GIB
            for name in ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current")
        )
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        return (
            f"{now:.2f} GiB by tensors (at most {most:.2f}), {reserved - now:.2f} GiB by torch that no tensor uses, "
            f"of {total:.2f} GiB"
        )
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / GIB:.2f} GiB resident (at most {peak_memory(device) / GIB:.2f})"
