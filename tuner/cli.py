"""The command line: presets, training, conversion and chat; whatever is heavy is imported inside the commands."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from tuner import __version__
from tuner.arguments import (
    ConfigType,
    Pairs,
    SettingType,
    TrainCommand,
    config_arguments,
    debug_option,
    gather,
    launch_options,
)
from tuner.conversions import convert_group
from tuner.errors import UserError
from tuner.evaluations import evaluate_group
from tuner.failures import EXIT_INTERRUPTED, exit_code, tell

LIST_FOOTER = """
CONTEXT is the tokens of a pack. STATE is the memory of weights, gradients and Adam; activations come on top.
`tuner train PRESET --nproc N` trains on N processes, each with the whole STATE; --deepspeed zero3 divides it by N."""
SHELLS = ("bash", "zsh", "fish")


def main() -> None:
    """Entry point of the `tuner` command."""
    # transformers imports DeepSpeed wherever it is installed, and that warns of a missing GPU before every command
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    sys.path.insert(0, "")  # as `python -m` does: a config may import a function that lies beside it
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code: 0 done, 2 the user can mend it, 130 Ctrl-C, 1 anything else.

    `tuner train` has more: 75 where it was told to end and has saved, 128 + N where signal N ended it.
    """
    try:
        code = cli.main(list(arguments), prog_name="tuner", standalone_mode=False, obj=tuple(arguments))
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        tell(error, debug="--debug" in arguments)
        return exit_code(error)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tuner")
@debug_option
def cli() -> None:
    """Fine-tune causal language models at long context.

    `tuner list-cfg` shows what there is to train; `tuner train internlm2_tiny-sft_full` tries it on a small machine.
    """


@cli.command("list-cfg")
@click.option("-p", "--pattern", default="", help="Only presets whose line has this; * and ? match any characters.")
@debug_option
def list_cfg(pattern: str) -> None:
    """List the presets: what each does, its model, context length and the hardware it is meant for."""
    from tuner.config import list_presets

    rows = list_presets(pattern)
    if not rows:
        raise UserError(f"No preset matches {pattern!r}. `tuner list-cfg` without -p shows all of them.")
    header = ("PRESET", "WHAT IT DOES", "MODEL", "CONTEXT", "MEANT FOR", "STATE")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    click.echo(LIST_FOOTER)


@cli.command("list-formats")
@click.argument("name", required=False)
@debug_option
def list_formats(name: str | None) -> None:
    """List the row formats of data files, each with an example; with NAME, one of them in full."""
    from tuner.dataset.formats.listing import details, overview

    click.echo("\n".join(overview() if name is None else details(name)))


@cli.command("join-files")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@debug_option
def join_files_command(first: Path, second: Path, out: Path) -> None:
    """Put the rows of FIRST and SECOND that share an id together in OUT: BFCL's questions and possible_answer."""
    from tuner.dataset.joining import join_files

    joined = join_files(first, second, out)
    click.echo(f"{out}: {joined.num_rows:,} rows; {joined.num_alone:,} of {first} have no partner and were left out.")


@cli.command("copy-cfg")
@click.argument("preset", type=ConfigType(files=False))
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, type=SettingType(), metavar="[NAME=VALUE]...")
@debug_option
def copy_cfg(preset: str, directory: Path, settings: tuple[tuple[str, str], ...]) -> None:
    """Write PRESET to DIRECTORY/PRESET.py: one self-contained file to read and edit. Never overwrites."""
    from tuner.config import PRESETS, render
    from tuner.nearest import did_you_mean_or_all
    from tuner.new_files import write_new

    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset}.{did_you_mean_or_all(preset, PRESETS)}")
    source = render(preset, gather(settings))
    path = directory / f"{preset}.py"
    write_new(path, source)
    click.echo(path)


@cli.command("train", cls=TrainCommand)
@config_arguments
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where logs and checkpoints go.  [default: work_dirs/NAME]",
)
@click.option("--resume", metavar="[CKPT]", help="Go on from CKPT, or from the newest checkpoint of the work dir.")
@click.option("--seed", type=int, help="The same as seed=N.")
@click.option("--deepspeed", metavar="NAME|FILE", help="The same as deepspeed=NAME: zero1 to zero3, or a JSON file.")
@click.option("--fsdp", metavar="full|hybrid", help="The same as fsdp=NAME: cut the model over all ranks, or in nodes.")
@launch_options
@debug_option
def train_command(
    config: str,
    settings: Pairs,
    cfg_options: Pairs,
    work_dir: Path | None,
    resume: str | None,
    seed: int | None,
    deepspeed: str | None,
    fsdp: str | None,
    **launch: Any,
) -> int:
    """Train a preset or a config file; NAME=VALUE changes a setting, and what is derived from it follows."""
    from tuner.launch.command import Job, train
    from tuner.launch.options import Options

    given = {"seed": seed, "deepspeed": deepspeed, "fsdp": fsdp}
    chosen = [*settings, *((name, str(value)) for name, value in given.items() if value is not None)]
    arguments = click.get_current_context().find_root().obj
    work_dir = work_dir or Path("work_dirs") / Path(config).stem
    return train(Job(config, work_dir, resume, partial(render_config, config, chosen, cfg_options), arguments),
                 Options(**launch))  # fmt: skip


def render_config(config: str, settings: Sequence[tuple[str, str]], cfg_options: Pairs) -> str:
    """The text of a preset or file with its settings filled in and the options added."""
    from tuner.config import add_options, render

    return add_options(render(config, gather(settings)), gather(cfg_options), config)


@cli.command("prepare", cls=TrainCommand)
@config_arguments
@debug_option
def prepare_command(config: str, settings: Pairs, cfg_options: Pairs) -> None:
    """Tokenise and pack the data of a config, and say what became of it. Needs no weights and no GPU.

    `tuner train` with the same settings then only opens what this has made, on every rank that sees the cache.
    """
    source = render_config(config, settings, cfg_options)
    from tuner.prepare import prepare

    prepare(source, name=config)


@cli.command("plan", cls=TrainCommand)
@config_arguments
@click.option("--gpus", type=int, default=8, show_default=True, help="GPUs of a node.")
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option("--gpu", metavar="NAME|FLOPS,BANDWIDTH", default="H100", show_default=True, help="Or A100, H200.")
@click.option("--gpu-memory", metavar="SIZE", help="Such as 80GiB.  [default: what torch sees of that GPU]")
@click.option("--link", metavar="NAME|BYTES/S", help="Slowest between ranks.  [default: NVLink; ib400 between nodes]")
@click.option("--price", type=float, help="Of a GPU for an hour.")
@click.option("--solve", is_flag=True, help="Try strategies, sp and checkpointing; show what fits, and what to set.")
@click.option("--measure", is_flag=True, help="Take the rates of matrix products and memory measured on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
@debug_option
def plan_command(config: str, settings: Pairs, cfg_options: Pairs, **options: Any) -> int:
    """Say before a launch whether it fits: memory part by part, time and cost. Needs no weights and no GPU.

    Exit code 0: it fits. 2: it does not, or a mistake in the command.
    """
    source = render_config(config, settings, cfg_options)
    from tuner.plan.command import plan

    return plan(source, name=config, **options)


@cli.command("preview", cls=TrainCommand)
@config_arguments
@click.option("-n", "num_documents", type=int, help="Documents to show.  [default: 3, or all of the step asked for]")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Draw them as a page; never overwrites.")
@click.option("--histograms", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write PNGs there.")
@click.option("--step", type=int, help="What this optimizer step sees, counted from 0.")
@click.option("--rank", type=int, help="What this data-parallel rank sees, counted from 0.")
@click.option("--num-ranks", type=int, help="Of how many data-parallel ranks.")
@click.option("--sequence-parallel-size", type=int, default=1, help="Draw where so many ranks would cut each pack.")
@click.option("--color/--no-color", "colour", default=None, help="Colour or brackets.  [default: colour on a terminal]")
@debug_option
def preview_command(config: str, settings: Pairs, cfg_options: Pairs, **options: Any) -> None:
    """Show what training will see, token by token: trained, masked, special, cut. Needs no weights."""
    from tuner.config import add_options, render

    source = add_options(render(config, gather(settings)), gather(cfg_options), config)
    from tuner.preview.command import preview

    preview(source, name=config, **options)


@cli.group("check")
@debug_option
def check_group() -> None:
    """Prove on a config's own data, with its model made small, what training takes for granted.

    Needs config.json and tokenizer, no weights and no GPU. Exit code 0: proven. 2: it is not so, or a mistake in the
    command.
    """


@check_group.command("sp", cls=TrainCommand)
@config_arguments
@click.option("--sp", metavar="N|ulysses=N,ring=M", help="Ranks that share a sequence.  [default: as in the config]")
@click.option("--ranks", type=int, help="Processes in all; data parallel beyond --sp.  [default: --sp, at least 2]")
@click.option("--tokens", type=int, default=64, show_default=True, help="To which documents are shortened, about.")
@click.option("--train", type=click.Choice(["both", "own", "last"]), default="both", show_default=True,
              help="own: the tokens that the config trains; last: those of the last shard of each pack.")  # fmt: skip
@click.option("--scale-loss", type=float, default=1.0, help="Try it: 0.5 divides the loss by a wrong number of ranks.")
@debug_option
def check_sp_command(config: str, settings: Pairs, cfg_options: Pairs, **options: Any) -> int:
    """Compare the gradient of a step spread over ranks with that of its documents one by one, each parameter."""
    source = render_config(config, settings, cfg_options)
    from tuner.prove.sp import check_sp

    return check_sp(source, name=config, **options)


@check_group.command("attn", cls=TrainCommand)
@config_arguments
@debug_option
def check_attn_command(config: str, settings: Pairs, cfg_options: Pairs) -> int:
    """Look for leaks between packed documents, and whether the rotary embedding is scaled as config.json says."""
    source = render_config(config, settings, cfg_options)
    from tuner.prove.attn import check_attn

    return check_attn(source, name=config)


@check_group.command("resume", cls=TrainCommand)
@config_arguments
@click.option("--kills", type=int, default=4, show_default=True, help="SIGKILLs, every other one inside a write.")
@click.option("--ranks", type=int, help="Processes.  [default: as the config's strategy needs]")
@click.option("--seed", "kill_seed", type=int, default=0, show_default=True, help="Of the moments of the kills.")
@debug_option
def check_resume_command(config: str, settings: Pairs, cfg_options: Pairs, **options: Any) -> int:
    """Train the config with its model made thin, kill it again and again, and compare it with a run without a stop."""
    source = render_config(config, settings, cfg_options)
    from tuner.prove.resume import check_resume

    return check_resume(source, name=config, **options)


@cli.command("lint")
@click.argument("data", nargs=-1, required=True, metavar="DATA...|CONFIG [NAME=VALUE]...")
@click.option("--format", "data_format", help="As in a config's data_format.  [default: found from the rows]")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens that training keeps of a row.")
@click.option("--model", metavar="DIR", help="Directory or hub name whose tokenizer counts the tokens.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Get all findings as lines.")
@click.option("--limit", type=click.IntRange(min=1), default=5, show_default=True, help="Findings shown of each check.")
@debug_option
def lint_command(data: tuple[str, ...], **options: Any) -> int:
    """List what will hurt in data files, or in those of a config: file, line, what came and what to do.

    Exit code 0: nothing above a note. 2: errors (training would stop, or learn what is wrong) or warnings (it would
    learn what was hardly meant), or a mistake in the command.
    """
    from tuner.lint.command import lint

    return lint(data, **options)


cli.add_command(convert_group)
cli.add_command(evaluate_group)


@cli.command("chat")
@click.argument("model_dir", type=click.Path(), metavar="MODEL|CHECKPOINT|ADAPTER")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="A LoRA on top of MODEL.")
@click.option("--template", help="Chat template.  [default: found from the directory]")
@click.option("--system", help="Text of the system turn.")
@click.option("--tools", type=click.Path(path_type=Path), metavar="FILE.json", help="Function schemas.")
@click.option("--tools-file", type=click.Path(path_type=Path), metavar="FILE.py", help="Functions that answer calls.")
@click.option("--allow-code", is_flag=True, help="Run the model's Python, as you, with limits: see SECURITY.md.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--seed", type=int, default=0, show_default=True)
@debug_option
def chat_command(model_dir: str, **options: Any) -> None:
    """Talk to a model on the terminal. Its tool calls are shown; you answer them, or your --tools-file does.

    Without --tools-file and --allow-code nothing is executed.
    """
    from tuner.chat.command import chat

    chat(model_dir, **options)


@cli.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@debug_option
def completion(shell: str) -> None:
    """Print the completion script of a shell: `eval "$(tuner completion bash)"` in ~/.bashrc turns it on."""
    kind = get_completion_class(shell)
    assert kind, shell
    click.echo(kind(cli, {}, "tuner", "_TUNER_COMPLETE").source())
