"""`tuner evaluate needle`: whether a model finds sentences again, at each length and depth."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuner.chat.loading import find_source, load_tokenizer
from tuner.dataset.needle_file import NeedleFile
from tuner.dataset.needle_grid import ON_COMMAND_LINE, NeedleGrid, Needles, cell_means
from tuner.dataset.needles import Cell, Document
from tuner.engine.aside import aside
from tuner.engine.heat_map import draw_maps, text_map
from tuner.engine.needle import scored_cells
from tuner.engine.scoring import alone
from tuner.evaluate.loaded import load_method, refuse_overwriting, told, warn_of_length
from tuner.method.recall import generated
from tuner.method.sft import SFT
from tuner.new_files import write_new

FILES = ("needle.json", "needle.png")


def evaluate_needle(
    model_dir: str,
    *,
    out: Path,
    adapter: Path | None = None,
    mode: str,
    pack_tokens: int,
    needle_file: Path | None = None,
    **asked: Any,
) -> None:
    """Score every cell, and write needle.json and needle.png to `out`, which must not hold them yet.

    Args:
        model_dir: what `tuner chat` takes.
        adapter: a LoRA on top of it.
        mode: "logprob", or "generate" to write the answers too.
        pack_tokens: in one pass.
        needle_file: the user's needles in the place of ours, as `NeedleFile` reads them.
        asked: the fields of a `NeedleGrid`.

    Raises:
        UserError: what cannot be loaded or parsed, or needles longer than the haystack.
    """
    refuse_overwriting(out, FILES)
    grid = NeedleGrid(**asked, names=ON_COMMAND_LINE)
    cells, _ = grid.cells(), grid.texts()
    source = find_source(model_dir, adapter)
    tokenizer = load_tokenizer(source)
    needles: Needles = grid if needle_file is None else NeedleFile(needle_file, grid)
    make = needles.maker(tokenizer)  # before the weights are loaded
    method = load_method(source, tokenizer)
    warn_of_length(method.llm, cells[-1].length, "--lengths")
    report(score(method, cells, make, mode=mode, pack_tokens=pack_tokens), out)


def score(
    method: SFT, cells: Sequence[Cell], make: Callable[[Cell], Document], *, mode: str = "logprob", pack_tokens: int
) -> list[dict[str, Any]]:
    """A row for each cell; the rate and the time left are told while it runs.

    Args:
        method: that holds the model.
        make: the document of a cell; of `NeedleGrid.maker`, or of your own.
        mode, pack_tokens: as for `evaluate_needle`.
    """
    with aside(method):
        found = scored_cells(alone(method), cells, make, pack_tokens)
        rows = list(told(found, [cell.length for cell in cells], "cells"))
        if mode == "generate":
            for row, cell in zip(rows, cells):
                row["generated"] = generated(method.llm, make(cell))
    return rows


def report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The maps on the terminal and as needle.png, all cells in needle.json."""
    column = "generated" if "generated" in rows[0] else "accuracy"
    grids = cell_means(rows, column)
    for name, grid in grids.items():
        print(f"\n{name}: answers that are {'generated' if column == 'generated' else 'the likeliest'}")
        print("\n".join(text_map(grid)))
    data, picture = (out / name for name in FILES)
    write_new(data, json.dumps(list(rows), indent=1) + "\n")
    draw_maps(grids, picture)
    print(f"\n{picture}  {data}")
