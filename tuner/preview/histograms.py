"""Histograms of a data set: lengths, trained tokens and sources, as blocks for the terminal and as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.build import PackedDataset, StreamedDataset
from tuner.new_files import write_new
from tuner.preview.characters import visible

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_WIDTH = 40
MOST_BINS = 12
MOST_SOURCES = 20
MOST_CHARACTERS = 48  # of a source's name
TAIL = 8  # times the median: where the longest is over it, bins double in width rather than stay equal
NAMES = ("lengths", "trained", "sources")


class Histogram(NamedTuple):
    """Bars with names, from the top down."""

    name: str
    title: str
    labels: list[str]
    counts: list[int]

    def bars(self) -> str:
        """Lines of blocks, the longest BAR_WIDTH characters."""
        label_width, number_width = max(map(len, self.labels)), max(len(f"{count:,}") for count in self.counts)
        most = max(1, *self.counts)
        lines = [
            f"{label:>{label_width}} {count:>{number_width},} {bar(count / most)}".rstrip()
            for label, count in zip(self.labels, self.counts)
        ]
        return "\n".join([self.title, *lines])


def of_epoch(dataset: PackedDataset | StreamedDataset) -> list[Histogram]:
    """The three histograms of an epoch, in the order of NAMES; weighted sources may give a document twice, or never.

    Of a stream: those of the windows that were needed so far.
    """
    lengths, num_loss_tokens = dataset.sizes
    sources = dataset.contributions
    return [
        of_values("lengths", "documents by their tokens", lengths),
        of_values("trained", "documents by their trained tokens", num_loss_tokens),
        of_sources([row["source"] for row in sources], [row["drawn_tokens"] for row in sources]),
    ]


def of_values(name: str, what: str, values: NDArray[np.int64]) -> Histogram:
    """How many of `values` (documents,) lie in each bin; the title has the least, the middle and the greatest."""
    edges = bin_edges(values)
    counts, _ = np.histogram(values, edges)
    least, middle, most = int(values.min()), int(np.median(values)), int(values.max())
    ends = [*(edge - 1 for edge in edges[1:-1]), most]  # max_length is often the most, and nothing lies beyond it
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in zip(edges, ends)]
    title = f"{what}: least {least:,}, median {middle:,}, most {most:,}, all {int(values.sum()):,}"
    return Histogram(name, title, labels, counts.tolist())


def of_sources(names: Sequence[str], tokens: Sequence[int]) -> Histogram:
    """Tokens of each source, the largest first; what is beyond MOST_SOURCES goes into one bar."""
    order = sorted(range(len(names)), key=lambda place: (-tokens[place], place))
    shown, rest = order[:MOST_SOURCES], order[MOST_SOURCES:]
    labels = [_shortened(visible(names[place])) for place in shown]
    counts = [tokens[place] for place in shown]
    if rest:
        labels.append(f"{len(rest):,} others")
        counts.append(sum(tokens[place] for place in rest))
    return Histogram("sources", f"tokens by source: {sum(tokens):,} in all", labels, counts)


def _shortened(name: str) -> str:
    """The end of a long path, so that it leaves room for the bars."""
    return name if len(name) <= MOST_CHARACTERS else "..." + name[3 - MOST_CHARACTERS :]


def bin_edges(values: NDArray[np.int64]) -> list[int]:
    """Whole numbers, each where a bin begins and the one before it ends; of equal width unless there is a long tail."""
    low, high = int(values.min()), int(values.max())
    if high > TAIL * max(1.0, float(np.median(values))):
        first = 1 << max(0, low.bit_length() - 1) if low else 0
        edges = [first]
        while edges[-1] <= high:
            edges.append(max(1, 2 * edges[-1]))
        return edges
    width = round_width((high - low + 1) / MOST_BINS)
    start = low // width * width
    return list(range(start, high + width + 1, width))[: (high - start) // width + 2]


def round_width(width: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is at least `width`."""
    unit = 1
    while True:
        for step in (1, 2, 5):
            if step * unit >= width:
                return step * unit
        unit *= 10


def bar(share: float) -> str:
    """A bar in eighths of a character; whatever is not nothing is seen."""
    eighths = round(share * BAR_WIDTH * 8)
    if share > 0:
        eighths = max(1, eighths)
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def targets(directory: Path) -> list[Path]:
    """The files that `save` makes."""
    return [directory / f"{name}.png" for name in NAMES]


def save(histograms: Sequence[Histogram], directory: Path) -> None:
    """Each histogram as a PNG. Raises UserError where the directory cannot be written to, or holds one already."""
    for histogram, path in zip(histograms, targets(directory)):
        write_new(path, png(histogram))


def png(histogram: Histogram) -> bytes:
    """The picture of a histogram. What its font may not have is written as an escape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of start-up that only pictures need
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(histogram.labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    places = range(len(histogram.labels))
    drawn = axes.barh(places, histogram.counts, color="#2a7f4f")
    axes.bar_label(drawn, labels=[f"{count:,}" for count in histogram.counts], padding=3, fontsize=8)
    labels = [label.encode("ascii", "backslashreplace").decode() for label in histogram.labels]
    axes.set_yticks(places, labels, fontsize=8, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(histogram.title, fontsize=9, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
