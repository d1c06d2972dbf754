"""Needles while a model trains: every so many steps, a heat map of what it finds again; training never notices."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tuner.dataset.needle_grid import NeedleGrid, Needles, cell_means
from tuner.dataset.needles import Cell
from tuner.dataset.needles import Document as Asked
from tuner.dataset.tokenize import Document
from tuner.engine.aside import aside
from tuner.engine.checkpoint import write_text_atomically
from tuner.engine.frame import Hook
from tuner.engine.heat_map import draw_maps, text_map
from tuner.engine.scoring import score_documents
from tuner.engine.strategy import StepResult, Strategy
from tuner.errors import UserError
from tuner.method.recall import marked, recall
from tuner.model.rope import check_learned

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

DIRECTORY = "needle"


class NeedleHook(Hook):
    """Every `interval` steps, and after the last: all ranks score given answers in documents of each length and depth.

    To needle/step_N.json and .png in the work dir, to the terminal, and, as means, to metrics.jsonl and TensorBoard.
    Lengths may be beyond max_length, or that of the stage under way: it is then seen how far the model reaches.
    """

    def __init__(self, *, interval: int = 0, needles: Needles | None = None, pack_tokens: int = 16384) -> None:
        """What to ask, and how often.

        Args:
            interval: steps; 0 is never.
            needles: which; None is those of `NeedleGrid` as it stands.
            pack_tokens: in one forward of a rank, or of the ranks that share a sequence; longer documents stand alone.
        """
        if interval < 0:
            raise UserError(f"needle_interval={interval}: choose 0 for never, or a number of steps.")
        self.interval = interval
        self.needles: Needles = NeedleGrid() if needles is None else needles
        self.pack_tokens = pack_tokens

    def before_train(self, runner: "Runner") -> None:
        """Make what can fail, and drop what a lost stretch of an earlier run left beyond the resumed step."""
        self.after_rollback(runner)
        if self.interval:
            self.cells = self.needles.cells()
            config = runner.model.get_submodule("llm").config
            check_learned(config, max(cell.length for cell in self.cells), "needle_lengths")
            self.make = self.needles.maker(runner.record.tokenizer)

    def after_rollback(self, runner: "Runner") -> None:
        """Forget the maps since the checkpoint: they come again."""
        directory = Path(runner.work_dir) / DIRECTORY
        if not runner.strategy.world.is_first or not directory.is_dir():
            return
        for path in directory.glob("step_*.*"):
            number = path.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > runner.strategy.step:
                path.unlink()

    def after_train_iter(
        self, runner: "Runner", batch_idx: int, data_batch: Sequence[Any], outputs: StepResult
    ) -> None:
        """Ask where the interval says so."""
        strategy = runner.strategy
        step, is_last = strategy.step, strategy.step == strategy.num_steps
        if not self.interval or (step % self.interval and not is_last):
            return
        with aside(strategy.model):
            rows = list(scored_cells(strategy, self.cells, self.make, self.pack_tokens))
        if strategy.device.type == "cuda":
            torch.cuda.empty_cache()  # what one long pass held would else lie beside what the next step needs
        runner.figures |= means_of(rows)
        if strategy.world.is_first:
            keep(rows, Path(runner.work_dir) / DIRECTORY, step)


def scored_cells(
    strategy: Strategy, cells: Sequence[Cell], make: Callable[[Cell], Asked], pack_tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for each cell, in their order, on all ranks alike: the cell's and `Recall`'s fields; within `aside`."""

    answers = {}

    def document(number: int) -> Document:
        ids, spans = make(cells[number])
        answers[number] = spans
        return Document(np.array(ids, np.uint32), marked(len(ids), spans))

    lengths = [cell.length for cell in cells]
    for number, scores in score_documents(strategy, lengths, document, pack_tokens):
        found = recall(answers.pop(number), scores.losses, scores.hits)
        yield {**cells[number]._asdict(), **found._asdict()}


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over all cells of a language, under the names that metrics.jsonl has."""
    figures = {}
    for column in ("accuracy", "log_probability"):
        for name, grid in cell_means(rows, column).items():
            figures[f"needle_{column}_{name}"] = sum(grid.values()) / len(grid)
    return figures


def keep(rows: Sequence[dict[str, Any]], directory: Path, step: int) -> None:
    """On the terminal, in JSON and in a picture."""
    grids = cell_means(rows, "accuracy")
    directory.mkdir(exist_ok=True)
    path = directory / f"step_{step:08d}.json"
    write_text_atomically(path, json.dumps({"step": step, "cells": list(rows)}, indent=1) + "\n")
    draw_maps(grids, path.with_suffix(".png"))
    shares = "  ".join(f"{name} {sum(grid.values()) / len(grid):.0%}" for name, grid in grids.items())
    print(f"  needles at step {step} | {shares} found | {path.with_suffix('.png')}", flush=True)
    for name, grid in grids.items():
        print("\n".join(f"    {name} {line}" for line in text_map(grid)), flush=True)
