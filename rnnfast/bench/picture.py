"""Draws the speed-up over nn.RNN, the time of a step beside its floor, and a heat map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from ..drawing import INK, QUIET, plain
from .rows import Row
from .workload import BOTH

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe, Ito
STYLES = {
    "rnnfast": {"linewidth": 2.4, "marker": "o", "markersize": 6},
    "torch": {"linewidth": 1.4, "linestyle": (0, (4, 2)), "marker": "s", "markersize": 3.5},
    "jax": {"linewidth": 1.4, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 3.5},
    "floor": {"linewidth": 1.2, "linestyle": (0, (1, 1.5))},
}
LABELS = {
    "rnnfast": "rnnfast.RNN",
    "torch": "torch.nn.RNN",
    "jax": "jax.lax.scan under jit",
    "floor": "the least this machine can need",
}
TITLE_ROOM, PANEL = 1.6, 4.2  # inches

Grid = dict[tuple[int, int], float]  # {(B, H): value}


def draw(found: Sequence[Row], where: str, out: Path, name: str) -> list[str]:
    """Writes the pictures that the rows have figures for, and returns the names of the files."""
    swept = [row for row in found if row.kind == "sweep" and row.what == BOTH]
    precisions = list(dict.fromkeys(row.precision for row in swept))
    by_precision = {p: [row for row in swept if row.precision == p] for p in precisions}
    written = []
    for suffix, function in (("", speed_up), ("-us-per-step", us_per_step), ("-heat", heat_map)):
        figure = function(by_precision, where)
        if figure is not None:
            figure.savefig(out / f"{name}{suffix}.png")
            written.append(f"{name}{suffix}.png")
    return written


def grid(found: Sequence[Row], who: str, value: Callable[[Row], float | None]) -> Grid:
    """{(B, H): value}; the fastest, if several of our providers ran."""
    rows = [row for row in found if (row.ours if who == "rnnfast" else row.provider == who)]
    best: dict[tuple[int, int], Row] = {}
    for row in sorted(rows, key=lambda row: row.median_s):
        best.setdefault((row.B, row.H), row)
    values = {size: value(row) for size, row in sorted(best.items())}
    return {size: v for size, v in values.items() if v is not None}


def speed_up(by_precision: dict[str, list[Row]], where: str) -> Figure | None:
    lines = {
        precision: {who: grid(rows, who, lambda row: row.over_torch) for who in ("rnnfast", "jax")}
        for precision, rows in by_precision.items()
    }
    lines = {precision: who for precision, who in lines.items() if who["rnnfast"]}
    if not lines:
        return None
    title = "Forward and backward through time: speed-up over torch.nn.RNN"
    figure, panels = _figure(title, where, len(lines), 1)
    for (precision, by_who), (axes,) in zip(lines.items(), panels):
        Bs = _over(axes, by_who, 1)
        axes.axhline(1, color=QUIET, linewidth=1)
        corner = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "top"}
        axes.text(0.006, 0.98, "torch.nn.RNN", color=QUIET, fontsize=10.5, **corner)
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
        low, high = axes.dataLim.intervaly
        axes.set_ylim(min(0.8, low / 1.2), max(1.25, high * 1.3))
        axes.set_ylabel(f"{precision}: nn.RNN's time / this line's time", fontsize=11)
        axes.set_xlabel("hidden size H (input size the same)", fontsize=11)
    _legend(
        figure,
        [w for w in ("rnnfast", "jax") if any(w in _drawn(b) for b in lines.values())],
        "B",
        Bs,
    )
    return figure


def us_per_step(by_precision: dict[str, list[Row]], where: str) -> Figure | None:
    if not by_precision:
        return None
    title = "Forward and backward through time: microseconds a time step"
    figure, panels = _figure(title, where, len(by_precision), 2)
    whos: list[str] = []
    for (precision, rows), (over_h, over_b) in zip(by_precision.items(), panels):
        lines = {who: grid(rows, who, lambda row: row.us_per_step) for who in ("rnnfast", "torch")}
        lines["floor"] = grid(rows, "torch", _floor_us) or grid(rows, "rnnfast", _floor_us)
        whos += [who for who in _drawn(lines) if who not in whos]
        Bs = _over(over_h, lines, 1)
        Hs = _over(over_b, lines, 0)
        for axes, name in ((over_h, "hidden size H"), (over_b, "batch size B")):
            axes.set_xlabel(name, fontsize=11)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
        over_h.set_ylabel(f"{precision}: µs a time step", fontsize=11)
        _colour_key(over_h, "B", Bs)
        _colour_key(over_b, "H", Hs)
    _legend(figure, whos, "", [])
    return figure


def heat_map(by_precision: dict[str, list[Row]], where: str) -> Figure | None:
    grids = {
        p: grid(rows, "rnnfast", lambda row: row.over_torch) for p, rows in by_precision.items()
    }
    grids = {p: g for p, g in grids.items() if g}
    if not grids:
        return None
    title = "Forward and backward through time: speed-up over torch.nn.RNN"
    figure, panels = _figure(title, where, len(grids), 1)
    for (precision, values), (axes,) in zip(grids.items(), panels):
        Bs, Hs = (sorted({size[i] for size in values}) for i in (0, 1))
        table = np.array([[values.get((B, H), np.nan) for H in Hs] for B in Bs])
        far = max(2.0, np.nanmax(np.maximum(table, 1 / table)))
        axes.imshow(table, cmap="PuOr_r", norm=LogNorm(1 / far, far), aspect="auto", origin="lower")
        for i, j in np.ndindex(table.shape):
            if not np.isnan(table[i, j]):
                dark = abs(np.log(table[i, j])) > 0.6 * np.log(far)
                colour = "white" if dark else INK
                axes.text(j, i, f"{table[i, j]:.3g}x", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(Hs)), [str(H) for H in Hs])
        axes.set_yticks(range(len(Bs)), [str(B) for B in Bs])
        axes.set_xlabel("hidden size H", fontsize=11)
        axes.set_ylabel(f"{precision}: batch size B", fontsize=11)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _floor_us(row: Row) -> float | None:
    return None if row.floor_s is None else 1e6 * row.floor_s / row.T


def _drawn(lines: dict[str, Grid]) -> list[str]:
    return [who for who, values in lines.items() if values]


def _over(axes: Axes, lines: dict[str, Grid], axis: int) -> list[int]:
    """Draws every line over size[axis], with a colour for each other size; returns these sizes."""
    others = sorted({size[1 - axis] for values in lines.values() for size in values})
    ticks = sorted({size[axis] for values in lines.values() for size in values})
    for who, values in lines.items():
        for colour, other in zip(COLOURS, others):
            points = sorted((s[axis], v) for s, v in values.items() if s[1 - axis] == other)
            axes.plot(*zip(*points), color=colour, **STYLES[who]) if points else None
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_minor_locator(NullLocator())
    plain(axes)
    return others


def _figure(title: str, where: str, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    height = TITLE_ROOM + PANEL * rows
    figure = Figure(figsize=(10, height), dpi=110)
    FigureCanvasAgg(figure)
    edges = {"left": 0.085, "right": 0.98, "bottom": 0.62 / height, "top": 1 - TITLE_ROOM / height}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**edges, "hspace": 0.42})
    place = {"color": INK, "va": "center"}
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=16, fontweight="bold", **place)
    figure.text(0.02, 1 - 0.63 / height, where, fontsize=11, **place | {"color": QUIET})
    return figure, panels


def _legend(figure: Figure, whos: Sequence[str], of: str, sizes: Sequence[int]) -> None:
    handles = [Line2D([], [], color=INK, label=LABELS[who], **STYLES[who]) for who in whos]
    handles += _colours(of, sizes)
    corner = {"loc": "upper left", "bbox_to_anchor": (0.012, 1 - 0.75 / figure.get_figheight())}
    options = {"frameon": False, "fontsize": 11, "handlelength": 2.6, "ncols": len(handles)}
    figure.legend(handles=handles, **corner, **options)


def _colour_key(axes: Axes, of: str, sizes: Sequence[int]) -> None:
    above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99)}
    short = {"handlelength": 1, "columnspacing": 1, "ncols": 4}
    axes.legend(handles=_colours(of, sizes), frameon=False, fontsize=9.5, **above, **short)


def _colours(of: str, sizes: Sequence[int]) -> list[Line2D]:
    pairs = zip(COLOURS, sizes)
    return [Line2D([], [], color=c, linewidth=5, label=f"{of} = {size}") for c, size in pairs]
