"""What the options of a launch and the variables of other launchers say together: how many processes, and where."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tuner.errors import UserError

LAUNCHERS = ("none", "pytorch", "slurm")
DEFAULT_PORT = 29400
LEFT_BEHIND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
BY_HAND = "torchrun --nproc-per-node 8 -m tuner train CONFIG --launcher pytorch"


class Options(NamedTuple):
    """As they are given on the command line."""

    launcher: str = "none"
    nproc: int | None = None  # processes on this node
    nnodes: int = 1
    node_rank: int | None = None
    master: str | None = None
    max_restarts: int = 0
    node_timeout: float = 900.0  # seconds for all nodes to come
    grace: float = 600.0  # seconds that ranks have to save and leave after a signal
    sbatch: Path | None = None
    gpu_memory: str | None = None
    force: bool = False  # start what the plan says cannot fit

    @property
    def starts_processes(self) -> bool:
        """Whether this process is to start others, rather than to train itself."""
        return self.nproc not in (None, 1) or self.nnodes > 1 or self.max_restarts > 0


class Node(NamedTuple):
    """This machine among those of a run, and where their launchers meet."""

    num_processes: int
    rank: int = 0
    num_nodes: int = 1
    host: str = "127.0.0.1"
    port: int = 0  # 0: one that is free

    @property
    def is_first(self) -> bool:
        """Whether the others come to this one."""
        return self.rank == 0


def read_node(options: Options) -> Node:
    """This machine among those of a run, from options alone.

    Raises:
        UserError: numbers that make no sense, or several nodes without all that they need to meet.
    """
    problems = [
        f"--{name.replace('_', '-')} {number}: give {lowest} or more."
        for name, lowest in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0), ("node_timeout", 1), ("grace", 0))
        if (number := getattr(options, name)) is not None and number < lowest
    ]
    if options.nnodes > 1:
        problems += _missing_for_nodes(options)
    elif options.node_rank:
        problems.append(f"--node-rank {options.node_rank} needs --nnodes, the number of nodes, which is 1 without it.")
    if problems:
        raise UserError("\n".join(problems))
    host, port = read_master(options.master) if options.master else ("127.0.0.1", 0)
    return Node(options.nproc or 1, options.node_rank or 0, options.nnodes, host, port)


def _missing_for_nodes(options: Options) -> list[str]:
    example = f"--nnodes {options.nnodes} --node-rank 0 --master HOST --nproc 8"
    given = {"--nproc": options.nproc, "--node-rank": options.node_rank, "--master": options.master}
    if missing := [name for name, value in given.items() if value is None]:
        return [f"--nnodes {options.nnodes} needs {', '.join(missing)} too, such as {example}; HOST is the first node."]
    rank = options.node_rank
    if rank is not None and not 0 <= rank < options.nnodes:
        return [f"--node-rank {rank}: {options.nnodes} nodes are counted from 0 to {options.nnodes - 1}."]
    return []


def read_master(text: str) -> tuple[str, int]:
    """`HOST[:PORT]` -> both; an IPv6 address with a port is in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--master {text}: expected HOST or HOST:PORT, such as node-a:{DEFAULT_PORT}.")
    return host, int(port)


def is_rank_of_another(options: Options, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another launcher, such as torchrun, has started this process as one of several.

    Raises:
        UserError: options and variables each say how many processes there are, or `--launcher pytorch` finds none.
    """
    found = [f"{name}={environment[name]}" for name in LEFT_BEHIND if name in environment]
    if options.launcher == "pytorch" and not {"RANK", "WORLD_SIZE"} <= set(environment):
        raise UserError(
            f"--launcher pytorch: torchrun's variables RANK and WORLD_SIZE are not set. Start with `{BY_HAND}`, or let "
            "tuner start the processes: --nproc 8."
        )
    if found and (options.starts_processes or options.nproc is not None):
        raise UserError(
            f"--nproc, --nnodes and --max-restarts start processes, but {', '.join(found)} say that this is one "
            "already. Leave the options out under another launcher, or unset these variables."
        )
    return bool(found)
