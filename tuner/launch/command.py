"""`tuner train`: here, as one rank of several, or as the launcher of several, as options and environment say."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tuner.errors import StoppedError, UserError
from tuner.failures import EXIT_INTERRUPTED, EXIT_SAVED
from tuner.launch import slurm
from tuner.launch.options import Node, Options, is_rank_of_another, read_node
from tuner.launch.rank import leave_with, printing_to, read_run
from tuner.new_files import check_new, write_new


class Job(NamedTuple):
    """What to train, and the command line that says so."""

    name: str  # of the config, in messages
    work_dir: Path
    resume: str | None
    render: Callable[[], str]  # the config's text with all settings filled in
    arguments: Sequence[str]  # of the whole command


def train(job: Job, options: Options) -> int:
    """Train; the exit code.

    Raises:
        UserError: whatever the user can mend.
    """
    told = read_run()
    if told is not None:
        leave_with(told.launcher)
        try:
            return train_here(job, told.source, told.resume)  # the launcher has asked the plan
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED  # click would end the line, of which there is none
    if options.sbatch is not None and options.launcher != "slurm":
        raise UserError("--sbatch FILE writes a script for SLURM. Add --launcher slurm.")
    if options.launcher == "slurm":
        if options.sbatch is not None or not slurm.is_in_step(os.environ):
            return write_script(job, options)
        options = enter_step(options)
    if is_rank_of_another(options):
        return train_as_rank(job, options)
    node = read_node(options)
    if not options.starts_processes:
        return train_here(job, job.render(), job.resume, partial(ask_plan, options=options))
    return launch(job, node, options)


def train_here(job: Job, source: str, resume: str | None, before: Callable[[Any], None] | None = None) -> int:
    """Train in this process, which may be one rank of several; `before` gets the config once it is checked."""
    from tuner.train import train  # brings torch and transformers: a misspelt setting has been reported by now

    try:
        train(
            source,
            work_dir=job.work_dir,
            resume=resume,
            name=job.name,
            before=before or (lambda config: None),
            explain=explain_shortage,
        )
    except StoppedError:
        return EXIT_SAVED
    return 0


def ask_plan(config: Any, options: Options, ranks: tuple[int, int] = (1, 1)) -> None:
    """UserError where the plan says that so many ranks, and so many on a node, have not got the memory they need.

    It is asked once, before a process starts; nothing is imported for it where the memory is not known.
    """
    import torch

    if options.gpu_memory is None and not torch.cuda.is_available():
        return
    from tuner.plan.forecast import Ranks, find_room, refuse

    refuse(config, find_room(config, options.gpu_memory, ranks[1]), Ranks(*ranks), force=options.force)


def explain_shortage(config: Any, shortage: Any) -> str:
    """What to say where memory ran out in a run of this config."""
    from tuner.engine.world import read_world
    from tuner.plan.forecast import Ranks, explain, find_room

    world = read_world()
    return explain(config, find_room(config, None, world.local_size), Ranks(world.size, world.local_size), shortage)


def train_as_rank(job: Job, options: Options) -> int:
    """Train as a rank that another launcher has started; only the first rank prints."""
    source = job.render()
    from tuner.engine.world import read_world

    world = read_world()
    log = job.work_dir / "logs" / f"rank_{world.rank}.log"
    with nullcontext() if world.is_first else printing_to(log):
        ask = partial(ask_plan, options=options, ranks=(world.size, world.local_size)) if world.is_first else None
        return train_here(job, source, job.resume, ask)


def enter_step(options: Options) -> Options:
    """What SLURM says of this task, as options or, for a task that is a rank itself, as torchrun's variables."""
    step = slurm.read_step(os.environ)
    if options.nproc is not None:
        return slurm.node_options(options, step)
    os.environ.update(slurm.rank_variables(step))
    return options


def write_script(job: Job, options: Options) -> int:
    """Print the batch script, and write it where asked; the config is checked now rather than in the queue.

    Raises:
        UserError: a mistake in the config or the options, or the file exists already.
    """
    if options.nproc is None:
        raise UserError("--launcher slurm needs --nproc, the processes on each node (one for each GPU).")
    read_node(options._replace(nnodes=1, node_rank=None))
    _, config = check_job(job)
    if options.gpu_memory is not None:  # of the job's nodes; what is here may have none
        from tuner.plan.forecast import Ranks, refuse, stated_room

        ranks = Ranks(options.nproc * options.nnodes, options.nproc)
        refuse(config, stated_room(options.gpu_memory), ranks, force=options.force)
    text = slurm.script(options, job.arguments, Path(job.name).stem)
    if options.sbatch is None:
        print(text, end="")
        return 0
    check_new(options.sbatch)
    write_new(options.sbatch, text)
    print(f"{text}\nwritten to {options.sbatch}: sbatch {options.sbatch}")
    return 0


def launch(job: Job, node: Node, options: Options) -> int:
    """Check everything once, then start the processes of this node."""
    # what torch's C++ warns of when a connection ends would bury the message of the rank that ended it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    source, config = check_job(job)
    check_gpus(node.num_processes, config)
    ask_plan(config, options, (node.num_processes * node.num_nodes, node.num_processes))
    from tuner.engine.work_dir import choose_checkpoints, locked
    from tuner.launch.launcher import Run
    from tuner.launch.launcher import launch as run_all

    work_dir = job.work_dir.resolve()
    if node.is_first:
        with locked(work_dir):
            choose_checkpoints(work_dir, job.resume)
    command = [sys.executable, "-m", "tuner", *job.arguments]
    is_debug, check = "--debug" in job.arguments, partial(check_size, config.strategy, node.num_processes)
    return run_all(Run(source, work_dir, job.resume, command, is_debug, check), node, options)


def check_job(job: Job) -> tuple[str, Any]:
    """The rendered config, checked as training would; its warnings are left to the process that trains."""
    source = job.render()
    from tuner.check import check
    from tuner.config import loads

    config = loads(source, job.name)
    logger = logging.getLogger("tuner")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        check(config)
    finally:
        logger.setLevel(level)
    return source, config


def check_size(strategy: Mapping[str, Any], num_local: int, num_ranks: int) -> None:
    """UserError where the strategy of a config cannot be spread over `num_ranks`, of which a node has `num_local`."""
    from tuner.engine.zero_config import Settings, check_ranks
    from tuner.parallel.mesh import arrange, read_degrees

    arrange(num_ranks, read_degrees(strategy.get("sequence_parallel_size", 1)))
    if (choice := strategy.get("deepspeed")) is not None:
        size = strategy.get("hpz_partition_size")
        check_ranks(choice, Settings(world_size=num_ranks, local_size=num_local, hpz_partition_size=size))


def check_gpus(nproc: int, config: Any) -> None:
    """UserError for more processes on this node than it has GPUs, where it has any and they are wanted."""
    import torch

    if config.strategy.get("device", "auto") == "cpu" or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if nproc > count:
        raise UserError(
            f"--nproc {nproc}: this node has {count} {'GPU' if count == 1 else 'GPUs'}, and each process needs one. "
            f"Give --nproc {count}, or show more of them with CUDA_VISIBLE_DEVICES."
        )
