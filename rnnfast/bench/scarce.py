"""Times rnnfast and nn.RNN when cores are scarce: with more threads than cores, as in a container
whose quota torch does not know, and beside processes that keep every core busy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backends import cpu
from .points import SCARCE_POINT
from .rows import Row, rows
from .runner import Runner
from .timing import take_turns
from .workload import BOTH, BUSY, MANY, Workload

THREADS_A_CORE = 8
LOOP = "while True: pass"


def measure(runner: Runner) -> list[Row]:
    """Times forward and backward of each provider, in turns. Does nothing if it cannot be timed."""
    threads, there = torch.get_num_threads(), cpu.cores()
    try:
        torch.set_num_threads(THREADS_A_CORE * there)
        found = _measure(runner, Workload(*SCARCE_POINT, MANY))
    finally:
        torch.set_num_threads(threads)
    with busy(there):
        return found + _measure(runner, Workload(*SCARCE_POINT, BUSY))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Runs this many processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _measure(runner: Runner, work: Workload) -> list[Row]:
    layers = runner.prepare(work)
    if not layers:
        return []
    calls = {name: layer.calls[BOTH] for name, layer in layers.items() if BOTH in layer.calls}
    samples = {BOTH: take_turns(calls, runner.seconds, runner.rounds)}
    return rows(work, samples, layers, None, None)
