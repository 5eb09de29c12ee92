"""The picture: for each delay the accuracy, the rest of the gradient, and the time per step."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..drawing import INK, QUIET, plain
from .results import CHANCE, where
from .training import CURES, PLAIN, TORCH

# Okabe and Ito's colours, which the colour-blind can distinguish, and dashes.
STYLES = dict(
    zip(
        CURES,
        (
            {"color": "#222222", "linewidth": 4},
            {"color": "#56B4E9", "linewidth": 2.4},
            {"color": "#D55E00", "linewidth": 2.4, "linestyle": (0, (5, 1.5))},
            {"color": "#009E73", "linewidth": 2.4, "linestyle": (0, (8, 2, 2, 2))},
            {"color": "#E69F00", "linewidth": 2.4, "linestyle": (0, (1.2, 1.2))},
            {"color": "#CC79A7", "linewidth": 2.4, "linestyle": (0, (3, 3))},
        ),
    )
)
LOWEST = -12  # the smallest power of ten shown of a gradient


def draw(result: dict, path: Path) -> None:
    tasks = result["tasks"]
    height = 2.9 * len(tasks) + 1.9  # inches, as all lengths here
    figure = Figure(figsize=(13, height), dpi=110)
    FigureCanvasAgg(figure)
    heading(figure, result)
    grid = figure.add_gridspec(
        len(tasks),
        3,
        left=0.065,
        right=0.985,
        top=1 - 2.05 / height,
        bottom=0.62 / height,
        wspace=0.3,
        hspace=0.62,
        width_ratios=(1, 1.1, 0.95),
    )
    for row, task in enumerate(tasks):
        accuracy, gradient, speed = (figure.add_subplot(grid[row, i]) for i in range(3))
        learning(accuracy, task)
        left_over(gradient, task)
        bars(speed, task)
        if row == 0:
            handles, labels = accuracy.get_legend_handles_labels()
            corner = (0.012, 1 - 0.78 / height)
            options = {"frameon": False, "fontsize": 12.5, "handlelength": 3.2, "ncols": 3}
            figure.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, **options)
    figure.savefig(path)


def heading(figure: Figure, result: dict) -> None:
    settings, height = result["settings"], figure.get_figheight()
    text = "Why an RNN forgets: a digit, then noise; which digit was it?"
    y = 1 - 0.32 / height
    figure.text(0.02, y, text, fontsize=18, fontweight="bold", color=INK, va="center")
    text = (
        f"Hidden size {settings['hidden_size']}, batch {settings['batch_size']}, "
        f"{settings['dtype']}; {where(result)}"
    )
    y = 1 - 0.66 / height
    figure.text(0.02, y, text, fontsize=12, color=QUIET, va="center")


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=13.5, fontweight="bold", color=INK, pad=10)


def learning(axes: Axes, task: dict) -> None:
    title(axes, f"Remember across {task['delay']} steps")
    epochs = range(1, task["epochs"] + 1)
    for name, style in STYLES.items():
        accuracies = task["networks"][name]["test_accuracy"]
        marker = "o" if task["epochs"] == 1 else None
        axes.plot(epochs, accuracies, label=name, marker=marker, **style)
    axes.axhline(CHANCE, color=QUIET, linewidth=1, linestyle=":")
    right_edge = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top"}
    axes.text(0.995, CHANCE - 0.03, "guessing", color=QUIET, fontsize=10.5, **right_edge)
    axes.set_xlabel("epoch", fontsize=12)
    axes.set_ylabel("test accuracy", fontsize=12)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    plain(axes)


def left_over(axes: Axes, task: dict) -> None:
    title(axes, "Left of the gradient, last epoch")
    for name, style in STYLES.items():
        left = task["networks"][name]["last_epoch"]["log10_left_by_lag"]
        axes.plot(range(len(left)), [10.0**x if x >= LOWEST - 3 else 0 for x in left], **style)
    axes.set_yscale("log")
    axes.set_ylim(10.0**LOWEST, 10.0**3)
    axes.axhline(1e-3, color=QUIET, linewidth=1, linestyle=":")
    right_edge = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top"}
    axes.text(0.995, 0.7e-3, "1/1000: the horizon", color=QUIET, fontsize=10.5, **right_edge)
    axes.set_xlabel("time steps back from the answer", fontsize=12)
    axes.set_ylabel("|dL/dh|, last step = 1", fontsize=12)
    plain(axes)


def bars(axes: Axes, task: dict) -> None:
    title(axes, f"tanh {task['speed_up']:.1f}x as fast as nn.RNN")
    times = {name: n["ms_per_training_step"] for name, n in task["networks"].items()}
    times = {TORCH: task["ms_of_nn_RNN"]} | times
    colors = {TORCH: "#BBBBBB"} | {name: style["color"] for name, style in STYLES.items()}
    for i, (name, ms) in enumerate(reversed(times.items())):
        axes.barh(i, ms, color=colors[name], height=0.68)
        label = TORCH if name == TORCH else f"rnnfast, {name}" if name == PLAIN else name
        text = f"{ms:.1f}  {label}"
        axes.text(ms + 0.015 * max(times.values()), i, text, fontsize=10.5, color=INK, va="center")
    axes.set_xlim(0, 2.2 * max(times.values()))
    axes.set_yticks([])
    axes.set_xlabel("ms per training step (median)", fontsize=12)
    plain(axes)
    axes.grid(visible=False)
