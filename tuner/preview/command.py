"""`tuner preview`: from a config's text to samples on the terminal, an HTML page and histograms; no model is needed."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tuner.check import DATA_PARTS, check
from tuner.config import loads
from tuner.engine.assemble import Assembly, plain
from tuner.errors import UserError
from tuner.new_files import check_new, write_new
from tuner.preview import histograms as figures
from tuner.preview.characters import Vocabulary
from tuner.preview.page import page
from tuner.preview.samples import Excerpt, pack_views, steps
from tuner.preview.tails import with_tails
from tuner.preview.terminal import draw_pack, legend, wants_colour

NUM_DOCUMENTS = 3


class View(NamedTuple):
    """What to show, and with whose eyes."""

    num_documents: int | None = None  # by default all of a step that is asked for, else NUM_DOCUMENTS
    step: int | None = None  # by default the first and those after it
    rank: int | None = None  # data-parallel; by default the config's
    num_ranks: int | None = None
    sequence_parallel_size: int = 1


def preview(
    source: str,
    *,
    name: str = "config.py",
    html: Path | None = None,
    histograms: Path | None = None,
    colour: bool | None = None,
    **view: int | None,
) -> None:
    """Print what training will see of the data, and draw it where asked.

    Args:
        source: the text of a config with all settings filled in; its model is never looked at.
        name: what error messages call the config.
        html: a file that must not exist yet.
        histograms: a directory for the histograms as PNG files, none of which may exist yet.
        colour: by default where standard output is a terminal.
        view: the entries of a View.

    Raises:
        UserError: whatever the user can mend; files that would be overwritten, before any data is read.
    """
    wanted = View(**view)  # type: ignore[arg-type]
    check_numbers(wanted)
    for path in [*([html] if html else []), *(figures.targets(histograms) if histograms else [])]:
        check_new(path)
    config = loads(source, name)
    check(config, DATA_PARTS)
    assembly = Assembly(config)
    vocabulary = Vocabulary(assembly.build(config.tokenizer))
    dataloader = build_dataloader(config, assembly, wanted)
    shards_node = config.train_dataloader.get("dataset", {}).get("shards")
    excerpts = with_tails(list(choose(dataloader, wanted)), shards_node, assembly)
    epoch_figures = figures.of_epoch(dataloader.dataset)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than the data
    in_colour = wants_colour(colour, is_terminal=sys.stdout.isatty(), environment=os.environ)
    print(f"\n{legend(colour=in_colour, cuts=wanted.sequence_parallel_size > 1)}")
    for pack, shown in excerpts:
        print("\n".join(draw_pack(pack, vocabulary, shown=shown, colour=in_colour)))
    print("\n" + "\n\n".join(figure.bars() for figure in epoch_figures), flush=True)
    if histograms:
        figures.save(epoch_figures, histograms)
        print(f"histograms: {', '.join(map(str, figures.targets(histograms)))}")
    if html:
        write_new(html, page(excerpts, vocabulary, epoch_figures, title=f"tuner preview {name}"))
        print(f"page: {html}")


def check_numbers(view: View) -> None:
    """Raise UserError for numbers that make no sense with any config."""
    lowest = {
        "-n": (view.num_documents, "documents to show"),
        "--num-ranks": (view.num_ranks, "data-parallel ranks"),
        "--sequence-parallel-size": (view.sequence_parallel_size, "ranks that share a pack"),
    }
    for option, (number, what) in lowest.items():
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: give at least 1, the number of {what}.")


def build_dataloader(config: Any, assembly: Assembly, view: View) -> Any:
    """The config's own dataloader, as it would be on the rank that is asked for.

    Raises:
        UserError: a rank that the run does not have.
    """
    node = plain(config.train_dataloader)
    if view.rank is None and view.num_ranks is None:
        return assembly.build(node)
    num_ranks = view.num_ranks if view.num_ranks is not None else node.get("num_ranks", 1)
    rank = view.rank if view.rank is not None else node.get("rank", 0)
    if not 0 <= rank < num_ranks:
        raise UserError(
            f"--rank {rank}: the run has {num_ranks} data-parallel ranks, counted from 0 to {num_ranks - 1}. "
            "--num-ranks says how many there are."
        )
    return assembly.build({**node, "rank": rank, "num_ranks": num_ranks})


def choose(dataloader: Any, view: View) -> Iterator[Excerpt]:
    """Packs in the order of training until as many documents are shown as were asked for."""
    left = view.num_documents if view.num_documents is not None or view.step is not None else NUM_DOCUMENTS
    for plan, batches in steps(dataloader, view.step):
        packs = pack_views(plan, batches, dataloader.dataset.shards, sequence_parallel=view.sequence_parallel_size)
        for pack in packs:
            if left == 0:
                return
            shown = len(pack.documents) if left is None else min(left, len(pack.documents))
            left = None if left is None else left - shown
            yield Excerpt(pack, shown)
