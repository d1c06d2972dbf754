"""Run a function on several gloo processes of this machine, as a test does."""

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist

from tuner.prove.processes import ProcessError, on_ranks

PRELOAD = (
    "tuner.prove.spread_step",
    "tuner.prove.processes",
    "tuner.engine.fsdp",
    "tuner.dataset.jinja_sandbox",
    "template_processes",
)
PRELOAD_ZERO = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "tuner.train")
"""what a run under DeepSpeed imports; the optimizer, which nobody asked for, brings torch's compiler with it"""

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # these ranks talk through gloo, also where there is a GPU


class RankError(AssertionError):
    """What the first rank to fail said."""


def run_on_ranks(num_ranks: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` in each of `num_ranks` new processes of one gloo group; what each returns, by rank.

    The function and its arguments are pickled: it stands at the top level of a module. `dist.get_rank()` tells it
    where it is. The first start in a process costs the imports.

    Raises:
        RankError: with the traceback of the rank that failed first; what others say because of it is left out.
    """
    start_server()
    test = (dict(os.environ), function, args)
    try:
        return on_ranks(num_ranks, _as_in_this_test, *test, timeout=timeout)
    except ProcessError as error:
        raise RankError(f"rank {error.rank} failed:\n{error.trace}") from None
    except RuntimeError as error:
        raise RankError(str(error)) from None


def by_turns(function: Callable[[Any], Any], items: Iterable[Any]) -> dict[Any, Any]:
    """`function` of each item, computed by one rank and told to all: for references that need no other rank."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts: list[Any] = [{item: function(item) for item in list(dict.fromkeys(items))[rank::num_ranks]}] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(parts, parts[rank])
    return {item: found for part in parts for item, found in part.items()}


def start_server() -> None:
    """The process of which all ranks are forks: once, with what the collected tests import on them."""
    needs_zero = "tuner.engine.zero" in sys.modules
    multiprocessing.set_forkserver_preload([*PRELOAD, *(PRELOAD_ZERO if needs_zero else ())])
    forkserver.ensure_running()


def _as_in_this_test(environment: dict[str, str], function: Callable, args: tuple) -> Any:
    """In the environment of the test, on one thread; whatever ends it is told with its traceback."""
    gc.freeze()  # what is imported stays; DeepSpeed collects garbage at every start
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        return function(*args)
    except BaseException:
        raise RankError(traceback.format_exc()) from None
