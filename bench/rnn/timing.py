"""Who is how fast: the candidates take turns, and are compared round by round."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

SAMPLE_S = 2e-3  # at least: the clock and the loop around a call are nothing beside it
SETTLE_S = 5e-3  # after which the threads of the one before have stopped spinning
SHORT_S = 20e-3  # a call so short feels that caches and threads have gone cold meanwhile
PATIENCE = 3  # how many times the time meant for it a slow point may take
GEMM_SIZE = 2048


class Quantiles(NamedTuple):
    median: float
    p10: float
    p90: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Quantiles(statistics.median(samples), tenths[0], tenths[-1])


def speed_up(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of theirs / ours. Whatever else the machine is doing, and at whatever
    clock, it does to both in a round."""
    return statistics.median(a / b for a, b in zip(theirs, ours))


def take_turns(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call, a sample of each in every round. All have been called before.

    Their order turns around from round to round: none always follows the same one.

    Args:
        seconds: to spend, if that is enough for ``rounds``; three there are in any case.
    """
    each = {name: _expected(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = time.perf_counter()
    for done in itertools.count():
        spent = time.perf_counter() - begin
        if done >= 3 and spent >= (seconds if done >= rounds else PATIENCE * seconds):
            return samples
        for name in order:
            samples[name].append(_sample(calls[name], each[name]))
        order.reverse()


def _expected(call: Callable[[], object]) -> float:
    once = _seconds(call, 1)
    return once if once > SHORT_S else min(_seconds(call, 1) for _ in range(5))


def _sample(call: Callable[[], object], expected: float) -> float:
    time.sleep(SETTLE_S)
    if expected < SHORT_S:
        call()
    return _seconds(call, max(1, round(SAMPLE_S / expected)))


def _seconds(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


class Gemm:
    """The machine's own rate at a large product of matrices, as a yardstick."""

    def __init__(self, size: int = GEMM_SIZE) -> None:
        self.a, self.b = torch.randn(2, size, size)
        self.out = torch.empty(size, size)
        self.gflop = 2 * size**3 / 1e9
        self._multiply()

    def gflops(self, times: int = 3) -> list[float]:
        return [self.gflop / _seconds(self._multiply, 1) for _ in range(times)]

    def _multiply(self) -> None:
        torch.mm(self.a, self.b, out=self.out)
