"""Run a function on several gloo processes of this machine, as a test does."""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tuner.prove.processes import ProcessError, on_ranks

PRELOAD = ("torch.distributed", "tuner.method.sft", "tuner.prove.processes")


class RankError(AssertionError):
    """What the first rank to fail said."""


def run_on_ranks(num_ranks: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` in each of `num_ranks` new processes of one gloo group; what each returns, by rank.

    The function and its arguments are pickled: it stands at the top level of a module. `dist.get_rank()` tells it
    where it is. The first start in a process costs the imports.

    Raises:
        RankError: with the traceback of the rank that failed first; what others say because of it is left out.
    """
    test = (dict(os.environ), function, args)
    try:
        return on_ranks(num_ranks, _as_in_this_test, *test, timeout=timeout, preload=PRELOAD)
    except ProcessError as error:
        raise RankError(f"rank {error.rank} failed:\n{error.trace}") from None
    except RuntimeError as error:
        raise RankError(str(error)) from None


def _as_in_this_test(environment: dict[str, str], function: Callable, args: tuple) -> Any:
    """In the environment of the test, on one thread; whatever ends it is told with its traceback."""
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        return function(*args)
    except BaseException:
        raise RankError(traceback.format_exc()) from None
