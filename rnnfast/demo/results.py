"""From curves to figures: the dictionary that becomes demo.json, the table, the remarks."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from rich.table import Table

import rnnfast

from ..report import cpu_name
from .tasks import Task
from .training import (
    BATCH_SIZE,
    HIDDEN_SIZE,
    LEARNING_RATE,
    NUDGED,
    RNNFAST,
    TORCH,
    Curve,
    contestants,
    largest_difference,
)

CHANCE = 0.1  # ten digits
FIRST_STEPS = 40


def figures(
    runs: list[tuple[Task, dict[str, Curve]]], *, seed: int, quick: bool, seconds: float
) -> dict:
    """All that was measured, and where; times in milliseconds per training step."""
    tasks = []
    for task, curves in runs:
        milliseconds = {name: curve.milliseconds() for name, curve in curves.items()}
        tasks.append(
            {
                "name": task.name,
                "time_steps": task.steps,
                "epochs": task.epochs,
                "training_steps": len(curves[TORCH].losses),
                "speed_up": milliseconds[TORCH] / milliseconds[RNNFAST],
                "networks": {
                    name: {
                        "loss": curve.epoch_losses(),
                        "test_accuracy": curve.accuracies,
                        "ms_per_training_step": milliseconds[name],
                    }
                    for name, curve in curves.items()
                },
                "largest_loss_difference_to_torch": {
                    name: {
                        "first_steps": largest_difference(curve, curves[TORCH], FIRST_STEPS),
                        "all_steps": largest_difference(curve, curves[TORCH]),
                        "epoch_means": max(
                            abs(a - b)
                            for a, b in zip(curve.epoch_losses(), curves[TORCH].epoch_losses())
                        ),
                    }
                    for name, curve in curves.items()
                    if name != TORCH
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


def machine() -> dict:
    rnn = contestants(0)[RNNFAST].rnn
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnfast": rnnfast.__version__,
        "rnnfast_backend": rnnfast.explain(rnn, torch.zeros(1, 1, 1)).partition(",")[0],
    }


def table(result: dict) -> Table:
    table = Table(title=f"Handwritten digits on {where(result)}")
    table.add_column("task")
    table.add_column("network")
    for column in ("loss", "accuracy", "ms per step", "speed-up"):
        table.add_column(column, justify="right")
    for task in result["tasks"]:
        for i, name in enumerate((TORCH, RNNFAST)):
            network = task["networks"][name]
            table.add_row(
                "" if i else f"{task['time_steps']} steps",
                name,
                f"{network['loss'][-1]:.4f}",
                f"{network['test_accuracy'][-1]:.1%}",
                f"{network['ms_per_training_step']:.2f}",
                f"{task['speed_up']:.2f}x" if i else "1.00x",
                end_section=bool(i),
            )
    return table


def where(result: dict) -> str:
    threads = result["machine"]["threads"]
    return f"{result['machine']['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def learned(task: dict) -> bool:
    """Whether either of the two does at least twice as well as guessing."""
    networks = task["networks"]
    return max(networks[name]["test_accuracy"][-1] for name in (TORCH, RNNFAST)) >= 2 * CHANCE


def notes(result: dict) -> list[str]:
    """What the figures mean, in words that follow from them."""
    said = [
        "loss: mean over the last epoch; accuracy: on digits not trained on; ms per step: median "
        "training step (forward, backward, optimizer), the two in turns."
    ]
    for task in result["tasks"]:
        differences = task["largest_loss_difference_to_torch"]
        text = (
            f"{task['name']}. The two losses of a training step differ by at most "
            f"{in_words(differences[RNNFAST])}."
        )
        if NUDGED in differences:
            text += (
                " Training makes rounding differences grow, whatever made them: torch.nn.RNN with "
                "the last bit of each weight changed differs from itself by at most "
                f"{in_words(differences[NUDGED])}."
            )
        if not learned(task) and not result["settings"]["quick"]:
            text += f" Neither network learned this task: guessing gives {CHANCE:.0%}."
        said.append(text)
    if not result["machine"]["rnnfast_backend"].startswith("cpu"):
        said.append(
            "The extension of rnnfast is not built here, so both ran on torch's kernels: there is "
            "no speed-up to see. `python -m rnnfast info` says why."
        )
    return said


def in_words(difference: dict) -> str:
    """The entry of one network in largest_loss_difference_to_torch."""
    return (
        f"{difference['first_steps']:.1e} in the first {FIRST_STEPS}, "
        f"{difference['all_steps']:.1e} in all (means of an epoch: {difference['epoch_means']:.1e})"
    )


def write(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
