"""What commands take: configs, settings and the options that many of them share, as click reads them."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from tuner.errors import UserError

ASSIGNMENT = re.compile(r"[^\W\d][\w.]*=")
F = TypeVar("F", bound=Callable[..., Any])
Pairs = tuple[tuple[str, str], ...]


def debug_option(command: F) -> F:
    """`--debug`, accepted before and after the subcommand; `run` reads it."""
    option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    return option(command)


class ConfigType(click.ParamType):
    """A preset's name or a config file; completes both."""

    name = "config"

    def __init__(self, *, files: bool) -> None:
        self.files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Presets that begin with what is typed; else files, where files are allowed."""
        from tuner.config import PRESETS

        presets = [CompletionItem(name) for name in PRESETS if name.startswith(incomplete)]
        return presets or ([CompletionItem(incomplete, type="file")] if self.files else [])


class SettingType(click.ParamType):
    """`name=value`; completes the names of the chosen config's settings."""

    name = "setting"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """`lr=` for `l`; nothing while the config is not there yet."""
        from tuner.config import read_source
        from tuner.configs.literals import settings

        try:
            known = settings(read_source(ctx.params.get("config") or ctx.params["preset"]))
        except UserError:
            return []
        return [CompletionItem(f"{name}=") for name in known if name.startswith(incomplete)]

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """`lr=1e-5` -> ("lr", "1e-5")."""
        name, equals, text = value.partition("=")
        if not equals or not name:
            self.fail(f"{value!r} is not of the form name=value.", param, ctx)
        return name, text


class TrainCommand(click.Command):
    """Gives `--cfg-options` all the values that follow it, and `--resume` an optional one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite both to forms that click knows."""
        try:
            return super().parse_args(ctx, bind_resume(repeat_cfg_options(args)))
        except click.NoSuchOption as error:
            raise click.UsageError(f"{error.format_message()} Settings have no dashes: lr=1e-5.", ctx) from error


def config_arguments(command: F) -> F:
    """`CONFIG|PRESET [NAME=VALUE]... [--cfg-options ...]`, for every command that reads a config as `train` does."""
    options = click.option(
        "--cfg-options",
        multiple=True,
        type=SettingType(),
        metavar="A.B=VALUE ...",
        help="Change parts of the assembly by their dotted path; several may follow.",
    )
    settings = click.argument("settings", nargs=-1, type=SettingType(), metavar="[NAME=VALUE]...")
    config = click.argument("config", type=ConfigType(files=True), metavar="CONFIG|PRESET")
    return config(settings(options(command)))


def launch_options(command: F) -> F:
    """Options that say how many processes train and how they are started: the fields of `launch.options.Options`."""
    options = (
        click.option("--nproc", type=int, help="Processes on this node, one for each GPU.  [default: this one]"),
        click.option("--nnodes", type=int, default=1, show_default=True, help="Machines, each started like this one."),
        click.option("--node-rank", type=int, help="Which of the machines this is, counted from 0."),
        click.option("--master", metavar="HOST[:PORT]", help="Where the first machine is found by the others."),
        click.option("--max-restarts", type=int, default=0, show_default=True, help="Starts after a rank has failed."),
        click.option("--node-timeout", type=float, default=900, show_default=True, help="Seconds for all to come."),
        click.option("--grace", type=float, default=600, show_default=True, help="Seconds to save after a signal."),
        click.option(
            "--launcher",
            type=click.Choice(["none", "pytorch", "slurm"]),
            default="none",
            show_default=True,
            help="pytorch: torchrun has started this. slurm: print a batch script; in a job, take what SLURM says.",
        ),
        click.option("--gpu-memory", metavar="SIZE", help="Such as 80GiB, to plan with.  [default: of the GPU here]"),
        click.option("--force", is_flag=True, help="Start also where the plan says that memory is not enough."),
        click.option("--sbatch", type=click.Path(path_type=Path), metavar="FILE", help="Write that batch script."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def repeat_cfg_options(arguments: Sequence[str]) -> list[str]:
    """`--cfg-options a=1 b=2` -> `--cfg-options=a=1 --cfg-options=b=2`."""
    result: list[str] = []
    taking = False
    for position, argument in enumerate(arguments):
        if argument == "--cfg-options":
            taking = any(ASSIGNMENT.match(following) for following in arguments[position + 1 : position + 2])
            if not taking:
                result.append(argument)  # for click to say that its value is missing
        elif taking and ASSIGNMENT.match(argument):
            result.append(f"--cfg-options={argument}")
        else:
            taking = False
            result.append(argument)
    return result


def bind_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` -> `--resume=auto`, unless what follows can be a checkpoint."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] == "--resume" and is_checkpoint(argument):
            result[-1] = f"--resume={argument}"
        else:
            result.append(argument)
    return ["--resume=auto" if argument == "--resume" else argument for argument in result]


def is_checkpoint(argument: str) -> bool:
    """Whether the word after `--resume` is its value, and no option, setting or config."""
    from tuner.config import PRESETS

    is_config = argument.endswith(".py") or argument in PRESETS
    return not (argument.startswith("-") or ASSIGNMENT.match(argument) or is_config)


def gather(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Pairs as a dict; the same name with two values is an error rather than a silent choice."""
    values: dict[str, str] = {}
    for name, text in pairs:
        if values.setdefault(name, text) != text:
            raise UserError(f"{name} is given twice, as {values[name]} and as {text}. Give it once.")
    return values
