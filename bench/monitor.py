"""Measures what GradientMonitor adds to the demo's training. Whole training steps take turns.

.venv/bin/python -m bench.monitor
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from rich.console import Console
from rich.table import Table

import rnnfast
from rnnfast.bench.timing import speed_up, take_turns
from rnnfast.command_arguments import seconds
from rnnfast.demo.tasks import COLUMNS, DELAYS, ROWS
from rnnfast.demo.training import BATCH_SIZE, LEARNING_RATE, Classifier, training_step
from rnnfast.diagnose.history import BLOCK
from rnnfast.report import cpu_name

LENGTHS = tuple(ROWS + delay for delay in DELAYS)  # of the demo
PLAIN, AGAIN = "record", "record, once more"  # their difference is noise
NAMES = ("no record", PLAIN, AGAIN, "monitor", "monitor, every=10", "monitor, writer")


def measure(T: int, limit: float, names: Sequence[str] = NAMES) -> dict[str, list[float]]:
    """Seconds of BLOCK training steps. The monitor reads its record after each step."""
    x, labels = torch.randn(BATCH_SIZE, T, COLUMNS), torch.randint(10, (BATCH_SIZE,))
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            torch.manual_seed(0)
            model = Classifier(rnnfast.RNN, track_gradient_flow=name != "no record")
            optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
            if "monitor" in name:
                options = {"every": 10} if "every" in name else {}
                if "writer" in name:
                    from torch.utils.tensorboard import SummaryWriter

                    folder = stack.enter_context(tempfile.TemporaryDirectory())
                    options["writer"] = stack.enter_context(SummaryWriter(folder))
                stack.enter_context(rnnfast.GradientMonitor(model, optimizer, **options))

            def steps(model=model, optimizer=optimizer) -> None:
                for _ in range(BLOCK):
                    training_step(model, optimizer, x, labels)

            calls[name] = steps
            steps()
        return take_turns(calls, limit, 7)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.monitor", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T", default=LENGTHS)
    parser.add_argument("--seconds-per-length", type=seconds, metavar="S", default=30.0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    table = Table(title=f"the demo's training step, 2 threads, {cpu_name()}")
    for column in ("T", "what", "ms a step", "time / record"):
        table.add_column(column)
    for T in args.lengths:
        samples = measure(T, args.seconds_per_length)
        for name, times in samples.items():
            ms = 1e3 * statistics.median(times) / BLOCK
            ratio = speed_up(times, samples[PLAIN]).median
            table.add_row(str(T), name, f"{ms:.2f}", f"{ratio:.3f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
