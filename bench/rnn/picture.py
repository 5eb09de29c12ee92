"""The picture: how many times as fast as nn.RNN, over the hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from .points import BOTH
from .report import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
STYLES = {  # what is drawn beside nn.RNN, the line at 1
    "rnnfast": {"linewidth": 2.4, "marker": "o", "markersize": 6},
    "jax": {"linewidth": 1.4, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 3.5},
}
LABELS = {"rnnfast": "rnnfast.RNN", "jax": "jax.lax.scan under jit"}
INK, QUIET = "#222222", "#666666"


def draw(found: Sequence[Row], where: str, path: Path) -> None:
    lines: dict[tuple[str, int], dict[int, float]] = {}  # {(provider, B): {H: speed-up}}
    for row in found:
        drawn = row.kind == "sweep" and row.what == BOTH and row.provider in STYLES
        if drawn and row.over_torch:
            lines.setdefault((row.provider, row.B), {})[row.H] = row.over_torch
    figure = Figure(figsize=(10, 5.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.11, 0.905, 0.68))
    batches = sorted({B for _, B in lines})
    colours = dict(zip(batches, COLOURS))
    for (provider, B), ratios in lines.items():
        axes.plot(list(ratios), list(ratios.values()), color=colours[B], **STYLES[provider])
    axes.axhline(1, color=QUIET, linewidth=1)
    corner = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "top"}
    axes.text(0.006, 0.98, "torch.nn.RNN", color=QUIET, fontsize=10.5, **corner)
    _axes_in_powers(axes, sorted({H for ratios in lines.values() for H in ratios}))
    _legend(figure, colours, [p for p in STYLES if any(p == q for q, _ in lines)])
    text = "Forward and backward through time: speed-up over torch.nn.RNN"
    figure.text(0.02, 0.95, text, fontsize=16, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 0.895, where, fontsize=11, color=QUIET, va="center")
    figure.savefig(path)


def _axes_in_powers(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(H) for H in sizes])
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(0.8, low / 1.2), max(1.25, high * 1.3))
    axes.set_xlabel("hidden size H (input size the same)", fontsize=12)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.tick_params(colors=INK, labelsize=11, length=0)


def _legend(figure: Figure, colours: dict[int, str], providers: Sequence[str]) -> None:
    handles = [Line2D([], [], color=INK, label=LABELS[p], **STYLES[p]) for p in providers]
    handles += [Line2D([], [], color=c, linewidth=5, label=f"B = {B}") for B, c in colours.items()]
    corner = {"loc": "upper left", "bbox_to_anchor": (0.012, 0.872)}
    options = {"frameon": False, "fontsize": 11, "handlelength": 2.6, "ncols": len(handles)}
    figure.legend(handles=handles, **corner, **options)
