"""How all pictures look."""

from __future__ import annotations

from matplotlib.axes import Axes

INK, QUIET = "#222222", "#666666"


def plain(axes: Axes) -> None:
    """Two quiet edges, a grid of values, no ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=11, length=0, which="both")
