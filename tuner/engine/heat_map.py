"""Heat maps of accuracy over length and depth: a PNG, and blocks for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Grid = Mapping[tuple[int, float], float]  # (length in tokens, depth in percent) -> share in [0, 1]
SHADES = " ░▒▓█"


def text_map(grid: Grid) -> list[str]:
    """Rows of depths and columns of lengths, each cell a percentage with its shade."""
    lengths, depths = axes_of(grid)
    lines = ["depth " + "".join(f"{length:>9,}" for length in lengths)]
    for depth in depths:
        shares = [grid[length, depth] for length in lengths]
        cells = "".join(f"{SHADES[round(share * (len(SHADES) - 1))] * 3:>4} {share:4.0%}" for share in shares)
        lines.append(f"{depth:4.0f}% {cells}")
    return lines


def axes_of(grid: Grid) -> tuple[list[int], list[float]]:
    """Lengths and depths in order."""
    return sorted({length for length, _ in grid}), sorted({depth for _, depth in grid})


def draw_maps(grids: Mapping[str, Grid], path: Path) -> None:
    """One panel for each name, in one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of start-up that only pictures need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(grids), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, grids.items()):
        lengths, depths = axes_of(grid)
        values: Sequence[Sequence[float]] = [[grid[length, depth] for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
        axes.set_title(name)
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(panels), label="answers that are found")
    figure.savefig(path, dpi=110)
