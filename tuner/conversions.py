"""`tuner convert` and its subcommands: without one, a checkpoint becomes a directory that others load."""

from pathlib import Path
from typing import Literal

import click

from tuner.arguments import debug_option

DTYPES: dict[str, Literal["auto", "float32", "bfloat16", "float16"]] = {
    "auto": "auto",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
DEFAULT = "checkpoint"


class ConvertGroup(click.Group):
    """A group whose words, where they name none of its commands, are those of `checkpoint`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`work out` -> `checkpoint work out`; a directory that is called like a command is given as `./merge`."""
        asks_for_group = not args or args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if asks_for_group else [DEFAULT, *args])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both forms, the one that people want first."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] CHECKPOINT|WORK_DIR OUT")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix=" " * len("Usage: "))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of `checkpoint`, then the commands."""
        self.commands[DEFAULT].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group("convert", cls=ConvertGroup)
def convert_group() -> None:
    """Write a trained model to OUT as a Hugging Face directory, or another form of a model.

    Nothing is ever overwritten, and OUT is whole or absent.
    """


@convert_group.command(DEFAULT, hidden=True)
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CHECKPOINT|WORK_DIR")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="auto",
    show_default=True,
    help="Of the written weights; auto keeps that of the checkpoint.",
)
@debug_option
def checkpoint_command(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write a trained model to OUT as a Hugging Face directory."""
    from tuner.convert.to_hf import convert

    click.echo(convert(checkpoint, out, dtype=DTYPES[dtype]))
