"""Times of CUDA kernels on the device, and the choice of a plan by them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuning
from . import cuda_plan
from .cuda_plan import Device, Plan

TRIED = 2.5  # times the least estimate that a plan that is tried may take
LENGTHS = 64, 256  # time steps of the two calls whose difference is a step's time


# Forward and backward of T steps: calls(size, plan, like, T).
Calls = Callable[[tuple, Plan, Tensor, int], Sequence[Callable[[], object]]]


def tuned(size: tuple, device: Device, like: Tensor, calls: Calls) -> tuple[int, ...]:
    """The fastest plan of a size, as `Wanted`."""
    plans = cuda_plan.KERNELS.cuda_plans(*size, *device)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "RNNFAST_AUTOTUNE: the first call of a size cannot be in the capture of a CUDA graph, "
            f"where nothing can be timed; call {size} once before"
        )

    def seconds(plan: Plan) -> float:
        """Seconds of a step, forward and backward."""
        return sum(time.step for time in times_of(size, plan, like, calls))

    choices = [plan.wanted for plan in plans if plan.step <= TRIED * plans[0].step]
    return _measured(device.name).best(
        " ".join(map(str, size)),
        choices,
        lambda wanted: seconds(cuda_plan.plan_for(*size, device, wanted)),
    )


@functools.cache
def _measured(name: str) -> tuning.Tuned:
    return tuning.Tuned(name, str(os.stat(cuda_plan.KERNELS.__file__).st_mtime_ns))


class Time(NamedTuple):
    """Seconds on the device: of a time step, and of what a call takes beside its steps."""

    step: float
    call: float


def times_of(
    size: tuple, planned: Plan, like: Tensor, calls: Calls, runs: int = 3
) -> tuple[Time, Time]:
    """Times of forward and of backward of a layer of zeros, from calls of two lengths. Each call
    counts with the least time of some runs. The recurrence alone: no products over all steps.

    Args:
        size: mode, units, groups, rows, norm.
        like: a tensor of the dtype and device.
        calls: makes the calls that are timed.
    """
    return slopes([calls(size, planned, like, T) for T in LENGTHS], like.device, runs)


def slopes(
    calls: Sequence[Sequence[Callable[[], object]]], device: torch.device, runs: int = 3
) -> tuple[Time, ...]:
    """Times of calls that differ in their number of time steps alone: a list for each of LENGTHS.
    Each call counts with the least time of some runs."""
    short, long = ([min(timed(f, device) for _ in range(runs)) for f in fs] for fs in calls)
    steps = [(b - a) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(short, long)]
    return tuple(Time(step, a - LENGTHS[0] * step) for step, a in zip(steps, short))


DELAY = 1e-4  # seconds that the device waits first, at least
LONGEST_DELAY = 0.1
CLOCK = 2e9  # cycles a second of a device that waits, at most


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device is busy with what `run` enqueues on the current stream.

    The device is kept waiting until the host has enqueued everything: else the host's own time is
    measured, which is longer than that of a short recurrence.
    """
    if device.type != "cuda":  # the emulation
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    delay = DELAY
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(delay * CLOCK))
        start.record()
        run()
        end.record()
        late = start.query()  # the device went on before the host was done
        end.synchronize()
        if not late or delay >= LONGEST_DELAY:
            return start.elapsed_time(end) / 1e3
        delay *= 4
