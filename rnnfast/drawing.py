"""The look that all pictures share."""

from __future__ import annotations

import io
import sys

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, QUIET = "#222222", "#666666"


class Picture(Figure):
    """A figure without pyplot. A notebook shows it as a PNG if it is the value of a cell."""

    def __init__(self, width: float, height: float) -> None:  # inches
        super().__init__(figsize=(width, height), dpi=110)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def show(self, warn: bool = True) -> None:
        """Shows the figure in a notebook.

        Raises:
            AttributeError: this is no notebook. Any figure without pyplot raises it.
        """
        ipython = sys.modules.get("IPython")
        if ipython is None or ipython.get_ipython() is None:
            raise AttributeError(
                "show: this figure has no window, and this is no notebook; savefig(path) writes a "
                "file"
            )
        from IPython.display import display

        display(self)


def plain(axes: Axes) -> None:
    """Two quiet edges, a grid of values, no ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=11, length=0, which="both")
