"""Curves of a finished run: a PNG from metrics.jsonl and a line of blocks for the terminal."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.engine.frame import Hook
from tuner.engine.metrics import METRICS

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

CURVES = {"loss": "loss per trained token", "lr": "learning rate", "grad_norm": "gradient norm before clipping"}
CURVES["tokens_per_second"] = "tokens per second"
BLOCKS = "▁▂▃▄▅▆▇█"
Share = tuple[str, float, float]
"""What has a share of the tokens: its name, the share that was asked for, and the one that came."""


class CurvesHook(Hook):
    """Draws `curves.png` when training ends."""

    priority = "VERY_LOW"  # metrics.jsonl is closed by then

    def after_run(self, runner: "Runner") -> None:
        """Read the whole run's metrics, those before a resume too."""
        path = Path(runner.work_dir) / METRICS
        if not runner.strategy.world.is_first or not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            return
        columns = {name: [math.nan if row[name] is None else row[name] for row in rows] for name in ("step", *CURVES)}
        columns["borders"] = [after["step"] for row, after in pairwise(rows) if row.get("stage") != after.get("stage")]
        columns["skipped"] = [row["step"] for row in rows if row["skipped"]]
        picture = path.with_name("curves.png")
        ledger = path.with_name("ledger.json")
        draw(columns, picture, shares(json.loads(ledger.read_text(encoding="utf-8"))) if ledger.exists() else [])
        losses = [loss for loss in columns["loss"] if not math.isnan(loss)]
        shown = f"loss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}   " if losses else ""
        skipped = f"   {len(columns['skipped'])} steps were skipped" if columns["skipped"] else ""
        print(f"{shown}curves: {picture}{skipped}", flush=True)


def shares(ledger: dict[str, Any]) -> list[Share]:
    """The shares of a run's stages, and inside each of its sources and buckets; none of a run without stages."""
    rows: list[Share] = []
    for place, stage in enumerate(ledger.get("stages", ()), 1):
        rows.append((f"stage {place}, {stage['steps']:,} x {stage['max_length']:,}", stage["asked"], stage["share"]))
        rows += [(f"of it {part['name'][-37:]}", part["asked"], part["share"]) for part in stage["parts"]]
    return rows


def draw(columns: dict[str, list[float]], path: Path, rows: Sequence[Share] = ()) -> None:
    """Four curves over the steps in one PNG, with marks where a step was skipped and a stage began; shares below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of start-up that only the end needs
    from matplotlib.figure import Figure

    height = 0.8 + 0.3 * len(rows) if rows else 0  # inches
    figure = Figure(figsize=(11, 7 + height))
    FigureCanvasAgg(figure)
    top: Any = figure
    if rows:
        halves: Any = figure.subfigures(2, 1, height_ratios=[7, height])
        top, bottom = halves
        draw_shares(bottom.add_axes((0.32, 0.4 / height, 0.6, 1 - 0.75 / height)), rows)
    margins = {"left": 0.07, "right": 0.98, "bottom": 0.07, "top": 0.95, "wspace": 0.18, "hspace": 0.3}
    for axes, (name, title) in zip(top.subplots(2, 2, gridspec_kw=margins).flat, CURVES.items()):
        axes.plot(columns["step"], columns[name], linewidth=1)
        for step in columns["skipped"]:
            axes.axvline(step, color="tab:red", alpha=0.3, linewidth=1)
        for step in columns.get("borders", ()):
            axes.axvline(step, color="tab:gray", linestyle="--", linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_shares(axes: Any, rows: Sequence[Share]) -> None:
    """Two bars for each: what came, and thin in front of it what was asked for."""
    names, asked, came = zip(*rows)
    places = range(len(rows))
    axes.barh(places, came, height=0.7, color="tab:blue", alpha=0.5, label="came")
    axes.barh(places, asked, height=0.2, color="black", label="asked")
    for place, (_, wanted, found) in enumerate(rows):
        axes.text(max(wanted, found), place, f" {found:.2%}, asked {wanted:.2%}", va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_title("share of tokens")
    axes.legend(loc="lower right", fontsize=8)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as blocks of eight heights, each the mean of an equal share: [3, 2, 1] -> "█▅▁"."""
    width = min(width, len(values))
    edges = [round(position * len(values) / width) for position in range(width + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[0] * width
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)
