"""``python -m rnnfast demo``: torch.nn.RNN and rnnfast.RNN learn the same digits side by side.

The pieces: tasks (the data), training (who learns, and how), results (figures, table, JSON) and
picture. Another network is one line in training.contestants, another task one in tasks.digit_tasks.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from .picture import draw
from .results import figures, notes, table, write
from .tasks import digit_tasks
from .training import NUDGED, contestants, train


def run(out: Path, *, epochs: int | None = None, seed: int = 0, quick: bool = False) -> dict:
    """Trains, prints, and writes ``demo.png`` and ``demo.json`` into the folder ``out``.

    Args:
        epochs: of every task; None for each one's own number.
        quick: a few steps, to see that everything works.

    Returns:
        What demo.json holds.
    """
    start = time.perf_counter()
    console = Console()
    console.print("Training torch.nn.RNN and rnnfast.RNN side by side; a minute on two idle cores")
    runs = []
    for task in digit_tasks(seed, epochs=epochs, quick=quick):
        models = contestants(seed)
        if runs:
            del models[NUDGED]  # once is enough to see what roundings do
        runs.append((task, train(task, models, seed)))
    result = figures(runs, seed=seed, quick=quick, seconds=time.perf_counter() - start)
    console.print(table(result))
    for note in notes(result):
        console.print(note, highlight=False)
    draw(result, out / "demo.png")
    write(result, out / "demo.json")
    console.print(
        f"Wrote {out / 'demo.png'} and {out / 'demo.json'}", highlight=False, soft_wrap=True
    )
    return result
