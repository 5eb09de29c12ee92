"""Draws the errors of a long sequence over its time steps, ours and torch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..drawing import INK, QUIET, plain
from .rows import Row

# Okabe and Ito's colours for the colour-blind. Broad lines lie below thin, dark ones.
PEER = {"color": "#56B4E9", "linewidth": 5, "solid_capstyle": "round"}
OURS = (
    {"color": "#222222", "linewidth": 1.2},
    {"color": "#D55E00", "linewidth": 1.2, "linestyle": (0, (4, 2))},
    {"color": "#009E73", "linewidth": 1.2, "linestyle": (0, (1, 1))},
)
RESULTS = {"y": "error of $y_t$", "dx": "error of $dL/dx_t$"}


def draw(rows: Sequence[Row], machine: dict, path: Path) -> None:
    """Draws a column for each dtype, and for each cell a panel for y and one for dx."""
    rows = [row for row in rows if row.curves]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    panels = [
        (cell, result) for cell in dict.fromkeys(row.cell for row in rows) for result in RESULTS
    ]
    width, height = max(4.2 * len(dtypes) + 0.6, 9.5), 2.3 + 2.65 * max(len(panels), 2)  # inches
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    text = "Errors at every time step"
    figure.text(0.3 / width, 1 - 0.35 / height, text, fontsize=17, fontweight="bold", color=INK)
    text = (
        "Against float64, float64 itself against long double; one layer, tanh in the RNN, batch 3,"
    )
    text += f" hidden size 64, five seeds; {machine['processor']}"
    figure.text(0.3 / width, 1 - 0.68 / height, text, fontsize=11.5, color=QUIET)
    if not dtypes:
        figure.text(0.5, 0.5, "no long sequence was asked for", ha="center", color=QUIET)
    else:
        grid = figure.add_gridspec(
            *(len(panels), len(dtypes)),
            left=0.9 / width, right=1 - 0.2 / width, top=1 - 1.7 / height, bottom=0.6 / height,
            wspace=0.3, hspace=0.42,
        )  # fmt: skip
        for i, dtype in enumerate(dtypes):
            for j, (cell, result) in enumerate(panels):
                shown = [row for row in rows if (row.dtype, row.cell) == (dtype, cell)]
                if not shown:
                    continue
                _panel(axes := figure.add_subplot(grid[j, i]), shown, result, left=i == 0)
                if i == j == 0:
                    _legend(figure, axes)
    figure.savefig(path)


def _panel(axes: Axes, rows: list[Row], result: str, left: bool) -> None:
    T = len(rows[0].curves[result]["theirs"])
    axes.plot(range(T), rows[0].curves[result]["theirs"], label="torch's module", **PEER)
    for row, style in zip((r for r in rows if r.backend != "torch"), OURS, strict=False):
        axes.plot(range(T), row.curves[result]["ours"], label=f"rnnfast, {row.backend}", **style)
    axes.set_title(
        f"{rows[0].cell}, {rows[0].dtype}: {RESULTS[result]}", loc="left", fontsize=13, color=INK
    )
    axes.set_yscale("log")
    shown = [x for row in rows for curve in row.curves[result].values() for x in curve if x > 0]
    if shown:
        middle = sorted(shown)[len(shown) // 2]
        axes.set_ylim(min(min(shown) / 1.5, middle / 10), max(1.5 * max(shown), middle * 10))
    axes.set_xlabel("time step t", fontsize=12)
    if left:
        axes.set_ylabel("RMS over batch and units", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    plain(axes)


def _legend(figure: Figure, axes: Axes) -> None:
    corner = (0.2 / figure.get_figwidth(), 1 - 0.8 / figure.get_figheight())
    handles, labels = axes.get_legend_handles_labels()
    options = {"frameon": False, "fontsize": 12.5, "ncols": len(labels)}
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, **options)
