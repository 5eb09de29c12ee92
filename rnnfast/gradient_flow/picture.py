"""The picture: the norm of a gradient over time or lag, with its half-life and horizon drawn in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..drawing import INK, QUIET, Picture, plain
from . import text

if TYPE_CHECKING:
    from .flow import GradientFlow

# Okabe and Ito's colours, which the colour-blind can distinguish. One curve is broad and one is
# dashed, so that both show where they coincide.
STYLES = (
    {"color": "#56B4E9", "linewidth": 5, "solid_capstyle": "round"},
    {"color": "#D55E00", "linewidth": 2, "linestyle": (0, (4, 2))},
)
SHADE = "#EFEFEF"
DECADES = 35  # powers of ten on the vertical axis, at most


@dataclass(frozen=True)
class Panel:
    """One layer and direction."""

    title: str  # the layer and direction, and the verdict
    xlabel: str
    ylabel: str
    x: Sequence[float]  # time steps or lags
    curves: Mapping[str, Sequence[float]]  # by their names in the legend; the last is in front
    start: tuple[float, float]  # x where the gradient begins, and its norm there
    towards: int  # the gradient travels to smaller x: -1; to larger x: 1
    half_life: float  # in steps; NaN or infinite: no line
    horizon: float


def draw(panels: Sequence[Panel], heading: str) -> Picture:
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    width, height = 6.6 * columns + 0.6 * (columns == 1), 3.4 * rows + 1.0  # inches
    figure = Picture(width, height)
    figure.text(
        0.3 / width, 1 - 0.3 / height, heading, fontsize=16, fontweight="bold", color=INK, va="top"
    )
    grid = figure.add_gridspec(
        rows,
        columns,
        left=1.0 / width,
        right=1 - 0.25 / width,
        top=1 - 1.15 / height,
        bottom=0.65 / height,
        wspace=0.24,
        hspace=0.5,
    )
    explained = False
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(i, columns)])
        _draw_panel(axes, panel)
        if not explained and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=11, frameon=True, framealpha=0.9, edgecolor="none")
            explained = True
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    title = panel.title
    if not math.isnan(panel.half_life):
        title += f", half-life {text.number_of_steps(panel.half_life)}"
        title += " steps" if panel.half_life < math.inf else ""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(panel.xlabel, fontsize=12, color=INK)
    axes.set_ylabel(panel.ylabel, fontsize=12, color=INK)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    plain(axes)
    left, right = panel.x[0], panel.x[-1]
    margin = 0.02 * max(right - left, 1)
    axes.set_xlim(left - margin, right + margin)

    shown = [y for curve in panel.curves.values() for y in curve if 0 < y < math.inf]
    if not shown:
        where = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no gradient that is finite and not 0", color=QUIET, **where)
        axes.set_yticks([])
        return
    top = max(shown)
    bottom = max(min(shown), top * 10.0**-DECADES)
    if bottom > top / 100:  # a flat curve shall look flat
        middle = math.sqrt(top * bottom)
        bottom, top = middle / 10, middle * 10
    if panel.horizon < math.inf and panel.start[1] > 0:
        bottom = min(bottom, panel.start[1] / 1000)
    axes.set_ylim(bottom / 2, top * 3)
    styles = STYLES[-len(panel.curves) :]
    for (name, curve), style in zip(panel.curves.items(), styles):
        axes.plot(panel.x, [y if y > 0 else math.nan for y in curve], label=name, **style)
    _draw_half_life(axes, panel, bottom / 2)
    _draw_horizon(axes, panel, margin)


def _draw_half_life(axes: Axes, panel: Panel, bottom: float) -> None:
    x, y = panel.start
    if not (0 < y < math.inf and 0 < panel.half_life < math.inf):
        return
    end = panel.x[0] if panel.towards < 0 else panel.x[-1]
    length = min(abs(end - x), panel.half_life * math.log2(y / bottom)) if y > bottom else 0
    line = [x, x + panel.towards * length], [y, y * 2 ** (-length / panel.half_life)]
    label = "decay with this half-life"
    axes.plot(*line, color=INK, linewidth=1.3, linestyle=":", label=label)


def _draw_horizon(axes: Axes, panel: Panel, margin: float) -> None:
    """Shades the steps behind the horizon."""
    if not panel.horizon < math.inf:
        return
    edge = panel.start[0] + panel.towards * panel.horizon
    end = panel.x[0] - margin if panel.towards < 0 else panel.x[-1] + margin
    axes.axvspan(min(edge, end), max(edge, end), color=SHADE, zorder=0, linewidth=0)
    axes.axvline(edge, color=QUIET, linewidth=1)
    inside = abs(edge - end) > 0.45 * abs(panel.x[-1] - panel.x[0])
    ha = "right" if (panel.towards < 0) == inside else "left"
    axes.annotate(
        f"1/1000 left after {panel.horizon:g} steps",
        (edge, 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5 if ha == "right" else 5, 0),
        textcoords="offset points",
        ha=ha,
        color=QUIET,
        fontsize=11,
    )


def draw_flow(flow: GradientFlow) -> Picture:
    whole = flow.pooled()
    T = whole.gain.shape[2]
    panels, memory = [], whole.memory
    for layer, verdicts in enumerate(whole.verdicts):
        for d, verdict in enumerate(verdicts):
            begun = (memory.sent[layer, d] > 0).nonzero().flatten().tolist()
            first = (begun[0] if d else begun[-1]) if begun else 0
            panels.append(
                Panel(
                    f"Layer {text.name_of(layer, d)}: {verdict.word}",
                    "time step t",
                    "norm over batch and units",
                    range(T),
                    {
                        f"gradient $dL/d{whole.cell.memory}_t$": memory.norm[layer, d].tolist(),
                        "the part that came back through time": memory.carry[layer, d].tolist(),
                    },
                    (first, memory.sent[layer, d, first].item()),
                    1 if d else -1,
                    whole.half_life[layer, d].item(),
                    whole.horizon[layer, d].item(),
                )
            )
    return draw(panels, "The gradient of the loss on its way back through time")
