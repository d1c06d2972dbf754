"""`tuner convert` and its subcommands: without one, a checkpoint becomes a directory that others load."""

from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from tuner.arguments import F, debug_option
from tuner.errors import UserError

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


class OneOf(click.Choice):
    """A choice whose mistakes are told in one line, without the usage."""

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        """Say what came and what is allowed."""
        raise UserError(f"{param.opts[0] if param else 'choice'}: {message}")


def dtype_option(command: F) -> F:
    """`--dtype`, for forms whose numbers may change."""
    kinds = OneOf(list(DTYPES))
    words = "Of the written weights; auto keeps that of what is read, fp32 exactly."
    return click.option("--dtype", type=kinds, default="auto", show_default=True, help=words)(command)


def output_options(command: F) -> F:
    """What every form of output has: the size of its files, and whether it is loaded again."""
    verify = click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Load OUT in a fresh process: tensors, ids, RoPE, logits.",
    )
    size = click.option("--max-shard-size", default="5GB", show_default=True, help="Of a file: 500MB, 5GB, 4GiB.")
    return size(verify(debug_option(command)))


def output_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the functions behind the commands take them."""
    from tuner.convert.sharding import parse_size

    names = {"dtype": DTYPES[options["dtype"]]} if "dtype" in options else {}
    return {**options, **names, "max_shard_size": parse_size(options["max_shard_size"])}


@convert_group.command(DEFAULT, hidden=True)
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CHECKPOINT|WORK_DIR")
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@output_options
def checkpoint_command(checkpoint: Path, out: Path, **options: Any) -> None:
    """Write a trained model to OUT as a Hugging Face directory."""
    from tuner.convert.to_hf import convert

    click.echo(convert(checkpoint, out, **output_arguments(options)))


@convert_group.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@output_options
def merge_command(base: Path, adapter: Path, out: Path, **options: Any) -> None:
    """Write the BASE model with the LoRA ADAPTER added to its weights to OUT."""
    from tuner.convert.merge import merge

    click.echo(merge(base, adapter, out, **output_arguments(options)))


@convert_group.command("shard")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@output_options
def shard_command(model: Path, out: Path, **options: Any) -> None:
    """Write the MODEL directory to OUT with its weights in files of another size, bit for bit the same."""
    from tuner.convert.shard import shard

    click.echo(shard(model, out, **output_arguments(options)))


@convert_group.command("llama")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@output_options
def llama_command(model: Path, out: Path, **options: Any) -> None:
    """Write an InternLM2 MODEL to OUT as a Llama, which needs no code beyond transformers."""
    from tuner.convert.llama import convert_to_llama

    click.echo(convert_to_llama(model, out, **output_arguments(options)))


@convert_group.command("internlm2")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@output_options
def internlm2_command(model: Path, out: Path, **options: Any) -> None:
    """Write a MODEL that `tuner convert llama` has made, or another like it, to OUT as an InternLM2."""
    from tuner.convert.llama import convert_to_internlm2

    click.echo(convert_to_internlm2(model, out, **output_arguments(options)))


@convert_group.command("legacy")
@click.argument("source", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--allow-legacy-pickle", "allow", is_flag=True, help="Read pickles, for their tensors alone.")
@click.option("--base", type=click.Path(path_type=Path), help="Model whose config and tokenizer go with the weights.")
@click.option("--lora-alpha", type=float, help="Of LoRA weights.  [default: as a config in the file states]")
@dtype_option
@output_options
def legacy_command(source: Path, out: Path, **options: Any) -> None:
    """Write the weights of an old .pth, .bin or DeepSpeed checkpoint to OUT: a model, or an adapter of LoRA weights."""
    from tuner.convert.legacy import convert_legacy

    click.echo(convert_legacy(source, out, **output_arguments(options)))


@convert_group.command("internevo")
@click.argument("source", type=click.Path(path_type=Path), metavar="PARTS|MODEL")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(min=1), help="Write parts for so many ranks.  [default: a model directory]")
@click.option(
    "--base", type=click.Path(path_type=Path), help="InternLM2 directory whose tokenizer goes with the model."
)
@click.option("--rotary", type=click.Choice(["half", "interleaved"]), help="Where model_config.pt does not say it.")
@click.option("--embedding", type=click.Choice(["columns", "rows"]), help="How parts are cut.  [default: as they come]")
@output_options
def internevo_command(source: Path, out: Path, rotary: str | None, embedding: str | None, **options: Any) -> None:
    """Join InternEvo's model_tp*_pp*.pt in PARTS to a model directory; with --tp, cut PARTS or a MODEL anew."""
    from tuner.convert.internevo import convert_internevo

    interleaved = None if rotary is None else rotary == "interleaved"
    split_hidden = None if embedding is None else embedding == "columns"
    options = output_arguments(options)
    click.echo(convert_internevo(source, out, interleaved=interleaved, split_hidden=split_hidden, **options))
