"""Times candidates that take turns, and compares them round by round."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch

from .workload import PRECISIONS

Call = Callable[[], object]
SAMPLE_S = 2e-3  # at least; the clock and the loop around a call are small beside it
SETTLE_S = 5e-3  # after this pause the threads of the candidate before no longer spin
SHORT_S = 20e-3  # a shorter call suffers from cold caches and threads
QUIET_S = 0.1  # after this pause no thread of a peer's own pool spins
PATIENCE = 3  # a slow workload may take this many times its planned time
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


class Quantiles(NamedTuple):
    median: float
    p10: float
    p90: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Quantiles(statistics.median(samples), tenths[0], tenths[-1])


def speed_up(theirs: Sequence[float], ours: Sequence[float]) -> Quantiles:
    """Quantiles of theirs / ours over rounds. Other work on the machine and its clock affect both
    times of a round."""
    return quantiles([a / b for a, b in zip(theirs, ours)])


class Clock(Protocol):
    def seconds(self, call: Call, times: int) -> float: ...  # mean of this many calls

    def settle(self, call: Call, expected: float) -> None: ...  # before a sample


class HostClock:
    """Times calls that return when the result is there."""

    def seconds(self, call: Call, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times

    def settle(self, call: Call, expected: float) -> None:
        time.sleep(SETTLE_S)
        if expected < SHORT_S:
            call()


class CudaClock:
    """CUDA events around each call. The call finds no input in the L2 cache."""

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        self._warm_up()

    def seconds(self, call: Call, times: int) -> float:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for begin, end in marks:
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.fmean(begin.elapsed_time(end) for begin, end in marks) / 1e3

    def settle(self, call: Call, expected: float) -> None:
        call()

    def _warm_up(self) -> None:
        """Raises the clock: an idle GPU runs at a sixth of it."""
        a = torch.randn(2048, 2048, device="cuda")
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.3:
            (a @ a).sum().item()


def take_turns(
    calls: dict[str, Call], seconds: float, rounds: int, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Seconds per call, a sample of each candidate in every round. All have run before.

    The order reverses from round to round, so that no candidate always follows the same one.

    Args:
        seconds: time to spend, if it is enough for ``rounds``. There are at least three rounds.
    """
    clock = clock or HostClock()
    each = {name: _expected(call, clock) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = time.perf_counter()
    for done in itertools.count():
        spent = time.perf_counter() - begin
        if done >= 3 and spent >= (seconds if done >= rounds else PATIENCE * seconds):
            return samples
        for name in order:
            clock.settle(calls[name], each[name])
            samples[name].append(clock.seconds(calls[name], max(1, round(SAMPLE_S / each[name]))))
        order.reverse()


def in_blocks(
    calls: dict[str, Call],
    alone: Collection[str],
    seconds: float,
    rounds: int,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Samples of :func:`take_turns`. Each candidate in ``alone`` has blocks to itself, between
    pauses of QUIET_S. There are two blocks of each, so that a change of the machine's speed meets
    all candidates. ``seconds`` is shared equally."""
    together = {name: call for name, call in calls.items() if name not in alone}
    blocks = [together, *({name: calls[name]} for name in calls if name in alone)]
    blocks = [block for block in blocks if block]
    passes = 1 if len(blocks) == 1 else 2
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for block in blocks * passes:
        if passes > 1:
            time.sleep(QUIET_S)
        share = seconds * len(block) / len(calls) / passes
        for name, found in take_turns(block, share, -(-rounds // passes), clock).items():
            samples[name] += found
    if passes > 1:
        time.sleep(QUIET_S)
    return samples


def _expected(call: Call, clock: Clock) -> float:
    once = clock.seconds(call, 1)
    return once if once > SHORT_S else min(clock.seconds(call, 1) for _ in range(5))


class Gemm:
    """The machine's rate at a large matrix product, as a yardstick."""

    def __init__(self, device: str, precision: str, clock: Clock) -> None:
        size = GEMM_SIZE[device]
        self.clock, self.gflop = clock, 2 * size**3 / 1e9
        like = {"device": device, "dtype": PRECISIONS[precision]}
        self.a, self.b = torch.randn(2, size, size, **like)
        self.out = torch.empty(size, size, **like)
        self._multiply()

    def gflops(self, times: int = 3) -> list[float]:
        return [self.gflop / self.clock.seconds(self._multiply, 1) for _ in range(times)]

    def _multiply(self) -> None:
        torch.mm(self.a, self.b, out=self.out)
