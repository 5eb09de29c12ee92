"""``python -m rnnfast demo``: why an RNN forgets, and what helps, on handwritten digits.

tasks makes the data, training trains the networks, results makes figures, table and JSON, and
picture draws. Another network is one line in training.CURES; another delay is a number in
tasks.DELAYS.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from .picture import draw
from .results import TABLE_WIDTH, figures, notes, table, write
from .tasks import digit_tasks
from .training import networks, train

EPOCHS, EPOCHS_FULL, EPOCHS_QUICK = 8, 30, 2


def run(
    out: Path, *, epochs: int | None = None, seed: int = 0, full: bool = False, quick: bool = False
) -> dict:
    """Trains, prints, and writes ``demo.png`` and ``demo.json`` into the folder ``out``.

    Args:
        epochs: of every task; None: 8, with ``full`` 30.
        quick: few digits, few epochs and short delays, to see that everything works.

    Returns:
        The content of demo.json.
    """
    start = time.perf_counter()
    console = Console()
    console.print("Six networks side by side, over three delays; two minutes on two idle cores")
    epochs = epochs or (EPOCHS_QUICK if quick else EPOCHS_FULL if full else EPOCHS)
    runs = []
    for task in digit_tasks(seed, epochs=epochs, quick=quick):
        runs.append((task, train(task, networks(seed), seed)))
    result = figures(runs, seed=seed, quick=quick, seconds=time.perf_counter() - start)
    Console(width=max(TABLE_WIDTH, console.width)).print(table(result))
    for note in notes(result):
        console.print(note, highlight=False)
    draw(result, out / "demo.png")
    write(result, out / "demo.json")
    console.print(
        f"Wrote {out / 'demo.png'} and {out / 'demo.json'}", highlight=False, soft_wrap=True
    )
    return result
