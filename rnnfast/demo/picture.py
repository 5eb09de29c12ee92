"""The picture: for each task loss, accuracy and time per training step."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .results import CHANCE, learned, where
from .training import NUDGED, RNNFAST, TORCH

# Okabe and Ito's colours, which the colour-blind tell apart; dashes over a broad line show where
# two curves are one.
STYLE = {
    TORCH: {"color": "#56B4E9", "linewidth": 5, "solid_capstyle": "round"},
    RNNFAST: {"color": "#D55E00", "linewidth": 2, "linestyle": (0, (4, 2))},
    NUDGED: {"color": "#777777", "linewidth": 1.2},
}
INK, QUIET = "#222222", "#666666"


def draw(result: dict, path: Path) -> None:
    tasks = result["tasks"]
    height = 2.9 * len(tasks) + 1.5  # inches, as all lengths here
    figure = Figure(figsize=(12, height), dpi=110)
    FigureCanvasAgg(figure)
    heading(figure, result)
    grid = figure.add_gridspec(
        len(tasks),
        3,
        left=0.06,
        right=0.985,
        top=1 - 1.65 / height,
        bottom=0.62 / height,
        wspace=0.27,
        hspace=0.62,
        width_ratios=(1, 1, 0.85),
    )
    for row, task in enumerate(tasks):
        loss, accuracy, speed = (figure.add_subplot(grid[row, column]) for column in range(3))
        title(loss, task["name"])
        curves(loss, task, "loss", chance=math.log(1 / CHANCE))
        loss.set_ylim(0, 2.6)
        loss.set_ylabel("training loss", fontsize=12)
        curves(accuracy, task, "test_accuracy", chance=CHANCE)
        accuracy.set_ylim(0, 1)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        accuracy.set_ylabel("test accuracy", fontsize=12)
        ends = [task["networks"][name]["test_accuracy"][-1] for name in (TORCH, RNNFAST)]
        right = f"{ends[0]:.0%} and {ends[1]:.0%} right"
        title(accuracy, right if learned(task) else "Not learned, by either")
        title(speed, f"{task['speed_up']:.1f}x as fast")
        bars(speed, task)
        if row == 0:
            handles, labels = loss.get_legend_handles_labels()
            nudged = f"{TORCH}, last bit of each weight changed"
            labels = [nudged if label == NUDGED else label for label in labels]
            corner = (0.012, 1 - 0.8 / height)
            options = {"frameon": False, "fontsize": 12, "handlelength": 2.6, "ncols": 3}
            figure.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, **options)
    figure.savefig(path)


def heading(figure: Figure, result: dict) -> None:
    settings, height = result["settings"], figure.get_figheight()
    text = "torch.nn.RNN and rnnfast.RNN, from the same weights, on the same batches"
    y = 1 - 0.32 / height
    figure.text(0.02, y, text, fontsize=18, fontweight="bold", color=INK, va="center")
    text = (
        f"Handwritten digits, one pixel per time step; hidden size {settings['hidden_size']}, "
        f"batch {settings['batch_size']}, {settings['dtype']}; {where(result)}"
    )
    y = 1 - 0.66 / height
    figure.text(0.02, y, text, fontsize=12, color=QUIET, va="center")


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=13.5, fontweight="bold", color=INK, pad=10)


def curves(axes: Axes, task: dict, key: str, chance: float) -> None:
    epochs = range(1, task["epochs"] + 1)
    for name in (TORCH, NUDGED, RNNFAST):
        if name in task["networks"]:
            marker = "o" if task["epochs"] == 1 else None
            axes.plot(epochs, task["networks"][name][key], label=name, marker=marker, **STYLE[name])
    axes.axhline(chance, color=QUIET, linewidth=1, linestyle=":")
    right_edge = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.text(0.995, chance, "guessing", color=QUIET, fontsize=10.5, **right_edge)
    axes.set_xlabel("epoch", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    plain(axes)


def bars(axes: Axes, task: dict) -> None:
    names = (RNNFAST, TORCH)  # from below
    times = [task["networks"][name]["ms_per_training_step"] for name in names]
    axes.barh(names, times, color=[STYLE[name]["color"] for name in names], height=0.62)
    for i, (name, ms) in enumerate(zip(names, times)):
        axes.text(0, i + 0.36, name, fontsize=12, color=INK, va="bottom")
        axes.text(ms + 0.015 * max(times), i, f"{ms:.1f} ms", fontsize=12, color=INK, va="center")
    axes.set_xlim(0, 1.26 * max(times))
    axes.set_ylim(-0.45, 1.75)
    axes.set_yticks([])
    axes.set_xlabel("ms per training step (median)", fontsize=12)
    plain(axes)


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.tick_params(colors=INK, labelsize=11, length=0)
