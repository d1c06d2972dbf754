"""`tuner evaluate` and its subcommands: what a model can do, measured."""

from pathlib import Path
from typing import Any

import click

from tuner.arguments import debug_option


@click.group("evaluate")
def evaluate_group() -> None:
    """Measure what a model can do."""


@evaluate_group.command("needle")
@click.argument("model_dir", type=click.Path(), metavar="MODEL|CHECKPOINT|ADAPTER")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="A LoRA on top of MODEL.")
@click.option("--lengths", default="1k,4k", show_default=True, help="Tokens of whole documents; k is 1,024.")
@click.option("--depths", default="0:100:10", show_default=True, help="FIRST:LAST:STEP or a list, in percent.")
@click.option("--languages", default="en,zh", show_default=True)
@click.option("--needles", "num_needles", type=click.IntRange(1, 100), default=1, show_default=True,
              help="From the depth on evenly to the end; all are asked for.")  # fmt: skip
@click.option("--trials", "num_trials", type=click.IntRange(min=1), default=1, show_default=True, help="Of each cell.")
@click.option("--haystack", multiple=True, metavar="FILE", help="Text in the place of made sentences.")
@click.option("--needle-file", type=click.Path(path_type=Path), metavar="FILE",
              help='Yours: JSON lines of {"needle": text, "question": text, "answer": text}.')  # fmt: skip
@click.option("--mode", type=click.Choice(["logprob", "generate"]), default="logprob", show_default=True,
              help="logprob: one pass over given answers. generate: write them too, which is slow.")  # fmt: skip
@click.option("--pack-tokens", type=click.IntRange(min=1), default=16384, show_default=True, help="In one pass.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="needle", show_default=True)
@debug_option
def needle_command(model_dir: str, **options: Any) -> None:
    """Hide sentences in long text and ask for them, at each length and depth: a heat map, and all cells as JSON."""
    from tuner.evaluate.needle import evaluate_needle

    evaluate_needle(model_dir, **options)


@evaluate_group.command("loss")
@click.argument("model_dir", type=click.Path(), metavar="MODEL|CHECKPOINT|ADAPTER")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="A LoRA on top of MODEL.")
@click.option("--format", "data_format", default="auto", show_default=True, help="As in a config's data_format.")
@click.option("--template", help="Chat template.  [default: the one that was trained, or fits the tokenizer]")
@click.option("--loss-on", default="assistant", show_default=True, help="As in a config's loss_on; text counts whole.")
@click.option("--max-length", metavar="TOKENS", help="Cut longer documents there, such as 32k.  [default: never]")
@click.option("--bucket", default="1k", show_default=True, metavar="TOKENS", help="The first; each next one doubles.")
@click.option("--pack-tokens", type=click.IntRange(min=1), default=16384, show_default=True, help="In one pass.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="loss", show_default=True)
@debug_option
def loss_command(model_dir: str, data: tuple[str, ...], **options: Any) -> None:
    """Loss on held-out documents, by position in them and by their length: tables, curves, and all numbers as JSON."""
    from tuner.evaluate.loss import evaluate_loss

    evaluate_loss(model_dir, data, **options)
