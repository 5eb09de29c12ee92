"""From curves to figures: the content of demo.json, the table, and the remarks below it."""

from __future__ import annotations

import json
import math
import platform
import statistics
from pathlib import Path

import torch
from rich import box
from rich.table import Table

import rnnfast
from rnnfast.gradient_flow import GradientFlow, reading
from rnnfast.gradient_flow.text import number_of_steps, plain

from ..report import cpu_name
from .tasks import Task
from .training import (
    BATCH_SIZE,
    COMPARED,
    CURES,
    HIDDEN_SIZE,
    LEARNING_RATE,
    PLAIN,
    TORCH,
    Curve,
    largest_difference,
    networks,
)

CHANCE = 0.1  # ten digits


def figures(
    runs: list[tuple[Task, dict[str, Curve]]], *, seed: int, quick: bool, seconds: float
) -> dict:
    """All measurements, with the machine; times are milliseconds per training step."""
    tasks = []
    for task, curves in runs:
        compared = len(curves[TORCH].seconds)  # the steps that all networks took
        ms = {name: milliseconds(curve, compared) for name, curve in curves.items()}
        tasks.append(
            {
                "name": task.name,
                "delay": task.delay,
                "time_steps": task.steps,
                "epochs": task.epochs,
                "speed_up": ms[TORCH] / ms[PLAIN],
                "ms_of_nn_RNN": ms[TORCH],
                "largest_loss_difference_to_nn_RNN": largest_difference(
                    curves[PLAIN], curves[TORCH]
                ),
                "networks": {
                    name: {
                        "loss": curves[name].epoch_losses(),
                        "test_accuracy": curves[name].accuracies,
                        "ms_per_training_step": ms[name],
                        "first_epoch": of_epoch(curves[name].flows[0]),
                        "last_epoch": of_epoch(curves[name].flows[-1]),
                    }
                    for name in CURES
                },
            }
        )
    return {
        "machine": machine(),
        "settings": {
            "seed": seed,
            "quick": quick,
            "hidden_size": HIDDEN_SIZE,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "dtype": "float32",
        },
        "seconds": seconds,
        "tasks": tasks,
    }


def milliseconds(curve: Curve, steps: int) -> float:
    return 1e3 * statistics.median(curve.seconds[:steps])


def of_epoch(flows: list[GradientFlow]) -> dict:
    """The gradient over the steps of an epoch, in the layer where it lasts longest.

    The half-life is that of the mean log_growth. log10_left_by_lag is the mean logarithm of the
    norm of dL/dh_t over that at the last time step. The horizon is read from this curve, which the
    loss allows: it is at the last step alone.
    """
    growths = torch.stack([flow.log_growth[:, 0] for flow in flows]).nanmean(0)  # [layers]
    layer = int(growths.nan_to_num(-math.inf).argmax())
    norms = torch.stack([flow.state_norm[layer, 0].flip(0) for flow in flows])  # [steps, T]
    left = (norms / norms[:, :1]).log10().mean(0)
    gone = (left <= math.log10(reading.HORIZON)).nonzero().flatten().tolist()
    verdicts = [flow.verdicts[layer][0].word for flow in flows]
    return {
        "half_life": reading.half_life(growths[layer]).item(),
        "horizon": gone[0] if gone else math.inf,
        "verdict": statistics.mode(verdicts),
        "log10_left_by_lag": left.tolist(),
    }


def machine() -> dict:
    rnn = networks(0)[PLAIN].rnn
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnfast": rnnfast.__version__,
        "rnnfast_backend": rnnfast.explain(rnn, torch.zeros(1, 1, rnn.input_size)).split()[0],
    }


TABLE_WIDTH = 80  # a narrower screen breaks its lines, and cuts no word


def table(result: dict) -> Table:
    """At most TABLE_WIDTH wide."""
    table = Table(
        title=f"Which digit was it? On {where(result)}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for head, justify in (
        ("steps", "right"),
        ("network", "left"),
        ("right", "right"),
        ("half-life", "right"),
        ("horizon", "right"),
        ("verdict", "left"),
        ("ms", "right"),
    ):
        table.add_column(head, justify=justify, no_wrap=True)
    for task in result["tasks"]:
        longest = task["time_steps"] - 1
        for i, (name, network) in enumerate(task["networks"].items()):
            first, last = network["first_epoch"], network["last_epoch"]
            lives = (number_of_steps(epoch["half_life"]) for epoch in (first, last))
            table.add_row(
                "" if i else f"{task['delay']}",
                name,
                f"{network['test_accuracy'][-1]:.0%}",
                " → ".join(lives),
                number_of_steps(last["horizon"], longest),
                last["verdict"],
                in_ms(network["ms_per_training_step"]),
            )
        table.add_row("", TORCH, "", "", "", "", in_ms(task["ms_of_nn_RNN"]))
        table.add_section()
    return table


def in_ms(x: float) -> str:
    return f"{x:.1f}" if x < 999.95 else f"{x:.0f}"


def where(result: dict) -> str:
    threads = result["machine"]["threads"]
    return f"{result['machine']['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def notes(result: dict) -> list[str]:
    """The meaning of the columns, and the results in words."""
    lines = [
        "The network sees a digit, a row of pixels at each step, then noise for so many steps, and "
        "names the digit. right: the accuracy on digits that it has never seen. half-life: time "
        "steps back until half of the gradient is left, in the first and in the last epoch; 'none' "
        "where it does not decay. horizon: time steps back until 1/1000 is left. ms: the median "
        f"training step (forward, backward, optimizer) of the first {COMPARED}, all networks in "
        "turns.",
        "",
    ]
    for task in result["tasks"]:
        lines.append(f"{task['name'].capitalize()}: {learners(task)}")
    difference = max(task["largest_loss_difference_to_nn_RNN"] for task in result["tasks"])
    ups = ", ".join(f"{task['speed_up']:.2f}x" for task in result["tasks"])
    lines += [
        "",
        f"tanh is the same network as torch.nn.RNN, from the same weights, and {ups} as fast while "
        f"it records its gradient. Their losses differ by at most {difference:.1e} in these steps.",
    ]
    if result["settings"]["quick"]:
        lines.append("--quick only shows that everything works: no network learns so fast.")
    if not result["machine"]["rnnfast_backend"].startswith("cpu"):
        lines.append(
            "The extension of rnnfast is not built here, so its networks ran as a loop in Python: "
            "there is no speed-up to see. `python -m rnnfast info` says why."
        )
    return lines


def learners(task: dict) -> str:
    """The networks that learned the task: they are right twice as often as guessing."""
    ends = {name: n["test_accuracy"][-1] for name, n in task["networks"].items()}
    learned = [f"{name} ({a:.0%})" for name, a in ends.items() if a >= 2 * CHANCE]
    rest = [f"{name} ({a:.0%})" for name, a in ends.items() if a < 2 * CHANCE]
    if not learned:
        return f"none has learned it (guessing: {CHANCE:.0%})."
    if not rest:
        return "all have learned something: " + ", ".join(learned) + "."
    return f"{', '.join(learned)} have learned something; {', '.join(rest)} guess."


def write(result: dict, path: Path) -> None:
    path.write_text(json.dumps(plain(result), indent=1) + "\n")
