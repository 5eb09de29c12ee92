"""The picture of a training: the norm of a gradient over training step and time step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..drawing import INK, QUIET, Picture
from ..gradient_flow.picture import DECADES

# From blue to yellow: the colour-blind see these colours much as others do. Smaller values are
# black. Magenta differs from all of them for every kind of colour-blindness; orange and red do not.
NONFINITE, SMALL, NOTHING = "#FF00FF", "#000000", "#FFFFFF"
COLOURS = colormaps["cividis"].with_extremes(over=NONFINITE, under=SMALL, bad=NOTHING)


@dataclass(frozen=True)
class HeatMap:
    """One layer and direction."""

    title: str
    below: str  # the second line of the title
    first: int  # training step of the first column
    width: int  # training steps to a column
    steps: Sequence[int]  # training steps, [S]
    norms: np.ndarray  # [S, T]; inf: a value is not finite; NaN: no row has the step
    nonfinite: Sequence[int]  # training steps with inf or NaN, in a column or between them

    def cells(self) -> np.ndarray:
        """[T, columns], with NaN in the columns of training steps without a record."""
        columns = [(step - self.first) // self.width for step in self.steps]
        cells = np.full((self.norms.shape[1], columns[-1] + 1), np.nan)
        cells[:, columns] = self.norms.T
        return cells


def draw(panels: Sequence[HeatMap], heading: str, label: str) -> Picture:
    """All panels with one colour scale. Its bar is at the right, named ``label``."""
    columns = min(len(panels), 2 if len(panels) <= 8 else 3)
    rows = math.ceil(len(panels) / columns)
    width, height = max(5.4 * columns, 8.0) + 1.6, 3.1 * rows + 1.4  # inches
    figure = Picture(width, height)
    figure.text(
        0.3 / width, 1 - 0.28 / height, heading, fontsize=16, fontweight="bold", color=INK, va="top"
    )
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.95 / width,
        right=1 - 1.75 / width,
        top=1 - 1.7 / height,
        bottom=0.65 / height,
        wspace=0.27,
        hspace=0.75,
    )
    norm = LogNorm(*_range(panels))
    for i, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[divmod(i, columns)]), panel, norm)
    place = (1 - 1.45 / width, 0.65 / height, 0.22 / width, 1 - 2.35 / height)
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=figure.add_axes(place))
    bar.set_label(label, fontsize=12, color=INK)
    bar.ax.tick_params(labelsize=11, colors=INK)
    bar.outline.set_visible(False)
    handles = _legend(panels, norm)
    if handles:
        corner = (0.2 / width, 1 - 0.58 / height)
        options = {"frameon": False, "fontsize": 12, "ncols": len(handles)}
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, **options)
    return figure


def _range(panels: Sequence[HeatMap]) -> tuple[float, float]:
    """The range of the colour scale: that of the norms, two to DECADES powers of ten."""
    values = np.concatenate([panel.norms.ravel() for panel in panels]).astype(float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 1.0
    top = values.max()
    bottom = max(values.min(), top * 10.0**-DECADES)
    if bottom > top / 100:  # a flat norm shall look flat
        middle = math.sqrt(top * bottom)
        bottom, top = middle / 10, middle * 10
    return bottom, top


def _draw_panel(axes: Axes, panel: HeatMap, norm: LogNorm) -> None:
    axes.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=32)
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (0, 15)}
    axes.annotate(panel.below, (0, 1), fontsize=12, color=INK, **at)
    axes.set_xlabel("training step", fontsize=12, color=INK)
    axes.set_ylabel("time step t", fontsize=12, color=INK)
    cells = panel.cells()
    T, columns = cells.shape
    left, right = panel.first - 0.5, panel.first - 0.5 + columns * panel.width
    # The logarithm of 0 does not exist, and imshow draws no inf.
    shown = np.where(cells < norm.vmin, norm.vmin / 2, np.minimum(cells, norm.vmax * 2))
    axes.imshow(
        shown,
        norm=norm,
        cmap=COLOURS,
        aspect="auto",
        origin="lower",
        interpolation="nearest",  # inf and NaN have no mean with their neighbours
        extent=(left, right, -0.5, T - 0.5),
    )
    # A column of one step may be too narrow to be seen.
    axes.plot(
        list(panel.nonfinite),
        [1.04] * len(panel.nonfinite),
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        **MARK,
    )
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(colors=INK, labelsize=11, length=3, color=QUIET)
    for spine in axes.spines.values():
        spine.set_color("#AAAAAA")


MARK = {
    "linestyle": "none",
    "marker": "v",
    "markersize": 7,
    "markerfacecolor": NONFINITE,
    "markeredgecolor": INK,
    "markeredgewidth": 0.5,
}


def _legend(panels: Sequence[HeatMap], norm: LogNorm) -> list:
    cells = [panel.cells() for panel in panels]
    found = []
    if any(len(panel.nonfinite) for panel in panels):
        found.append(Line2D([], [], color=NONFINITE, label="inf or NaN", **MARK))
    if any((x < norm.vmin).any() for x in cells):
        found.append(Patch(color=SMALL, label=f"0, or below {norm.vmin:.0e}"))
    if any(np.isnan(x).any() for x in cells):
        found.append(Patch(facecolor=NOTHING, edgecolor=QUIET, label="nothing to record"))
    return found
