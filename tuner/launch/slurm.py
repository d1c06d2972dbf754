"""SLURM: the script that sbatch takes, and its variables as ours inside a job."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tuner.errors import UserError
from tuner.launch.options import Options
from tuner.masking import mask

FIRST_PORT, NUM_PORTS = 20000, 10000  # of a job, by its number: jobs that share a node seldom meet
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM numbers the steps of batch scripts and of interactive shells from here
NEEDED = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST")


class Step(NamedTuple):
    """This task among those that srun has started."""

    job: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    host: str  # of the first task

    @property
    def port(self) -> int:
        """Where the processes of the job meet."""
        return FIRST_PORT + self.job % NUM_PORTS


def is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process: not a login shell, a batch script or an interactive one."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def read_step(environment: Mapping[str, str]) -> Step:
    """SLURM's variables of a step.

    Raises:
        UserError: some are missing, or cannot be read.
    """
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise UserError(f"--launcher slurm: srun has not set {', '.join(missing)}. Start with srun, in a job.")
    numbers = {name: environment[name] for name in NEEDED[:-1]}
    if wrong := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        raise UserError(f"--launcher slurm: {', '.join(wrong)}: expected numbers. Start with srun, in a job.")
    job, rank, size, local_rank, node_rank = map(int, numbers.values())
    sizes = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    if sum(sizes) != size or node_rank >= len(sizes):
        raise UserError(
            f"--launcher slurm: SLURM_NTASKS={size} and SLURM_STEP_TASKS_PER_NODE={sizes} contradict each other. "
            "Start with srun, in a job."
        )
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return Step(job, rank, size, local_rank, sizes[node_rank], node_rank, len(sizes), host)


def tasks_per_node(text: str) -> list[int]:
    """`8(x2),4` -> [8, 8, 4]."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text}: expected such as 8(x2),4.")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """`gpu-[03-06,09]-ib,login` -> gpu-03-ib."""
    first = re.match(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: expected names of nodes, such as gpu-[03-06].")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def rank_variables(step: Step) -> dict[str, str]:
    """What torchrun would set for a task that is itself a rank."""
    return {
        "RANK": str(step.rank),
        "WORLD_SIZE": str(step.size),
        "LOCAL_RANK": str(step.local_rank),
        "LOCAL_WORLD_SIZE": str(step.local_size),
        "MASTER_ADDR": step.host,
        "MASTER_PORT": str(step.port),
    }


def node_options(options: Options, step: Step) -> Options:
    """The options of a task that starts the processes of its node.

    Raises:
        UserError: an option says otherwise than SLURM, or a node has several such tasks.
    """
    if step.size != step.num_nodes:
        raise UserError(
            f"--nproc {options.nproc} starts the processes of a node, and srun has started {step.local_size} tasks on "
            "this one. Give srun --ntasks-per-node=1, or leave --nproc out for one process a task."
        )
    if options.nnodes not in (1, step.num_nodes) or options.node_rank not in (None, step.node_rank):
        raise UserError(
            f"--nnodes {options.nnodes} contradicts SLURM, whose step has {step.num_nodes} nodes. Leave it out here."
        )
    if step.num_nodes == 1:
        return options
    master = options.master or f"{step.host}:{step.port}"
    return options._replace(nnodes=step.num_nodes, node_rank=step.node_rank, master=master)


def script(options: Options, arguments: Sequence[str], name: str) -> str:
    """A batch script that runs `tuner` with these arguments on the nodes that the options ask for.

    Raises:
        UserError: an argument is a token or password, which the script would keep.
    """
    if secret := [argument for argument in arguments if mask(argument) != argument]:
        raise UserError(
            f"{mask(secret[0])} holds a token or password, which the script would keep. Set it in the environment of "
            "the job, where a config reads it as os.environ[...]."
        )
    command = shlex.join([sys.executable, "-m", "tuner", *without_sbatch(arguments)])
    return f"""#!/bin/bash
# Written by `tuner train --launcher slurm`; edit it, then: sbatch FILE
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9_.-]", "_", name)}
#SBATCH --nodes={options.nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={options.nproc}
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@{round(options.grace)}
# Most clusters want these three too:
##SBATCH --partition=NAME
##SBATCH --account=NAME
##SBATCH --time=1-00:00:00

# One task on each node, which starts, watches and ends the {options.nproc} processes of its node.
srun --kill-on-bad-exit=1 {command}
"""


def without_sbatch(arguments: Sequence[str]) -> list[str]:
    """The arguments less `--sbatch FILE`, which is for the one who writes the script."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--sbatch" and not argument.startswith("--sbatch="):
            kept.append(argument)
        skip = argument == "--sbatch"
    return kept
