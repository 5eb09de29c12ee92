"""Layers of a stack at the same time, on a GPU.

A layer needs the whole sequence of the one below, but not at once: while it computes a stretch of
time steps, the one below computes the next stretch, on a stream of its own. A recurrence waits for
its own last step and leaves most of a GPU idle, so that others have room beside it. Backward
follows by itself: autograd runs what it differentiates on the stream of its forward, and waits
where one stream takes from another.

Off unless RNNFAST_OVERLAP is set: no GPU has shown yet what it gains. In bfloat16 and float16 the
gradient that crosses from stretch to stretch is rounded to that type, as the state is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ENABLED = os.environ.get("RNNFAST_OVERLAP", "") not in ("", "0")
CALL = 40.0  # microseconds of a stretch beside its time steps: calls and launches; a guess
LEAST_GAIN = 1.2


def steps_of_stretch(T: int, layers: int, window: int | None, step: float) -> int:
    """How many of T steps a stretch has, 0 where the layers had better come one after another.

    n stretches take (layers + n - 1) times what one does, T / n steps of ``step`` microseconds and
    CALL beside; least for n = sqrt((layers - 1) T step / CALL). One is whole windows of truncated
    backpropagation through time.
    """
    number = round(math.sqrt((layers - 1) * T * step / CALL))
    if number < 2 or layers < 2:
        return 0
    unit = window or 1
    steps = -(-T // (number * unit)) * unit
    number = -(-T // steps)
    together = (layers + number - 1) * (steps * step + CALL)
    return steps if number > 1 and together * LEAST_GAIN < layers * (T * step + CALL) else 0


Compute = Callable[[int, Tensor, "Tensor | None", slice], tuple[Tensor, Tensor]]


def wavefront(
    u: Tensor, states: Sequence[Tensor | None], steps: int, compute: Compute
) -> tuple[Tensor, list[Tensor]]:
    """The output [T, B, H] of the last layer and each layer's last state.

    Args:
        u: [T, B, I], what the first layer gets.
        states: the first state of each layer.
        steps: of a stretch.
        compute: (layer, its input, its state before, which of the T steps) -> what the layer above
            gets, and the state behind.
    """
    spans = [slice(t, min(t + steps, len(u))) for t in range(0, len(u), steps)]
    stretches, states = [u[span] for span in spans], list(states)
    lanes = Lanes(u.device, len(states))
    # What one lane has made and another reads lives until all have come together: memory that is
    # free is free for the lane that it came from, at once.
    alive: list[object] = [*stretches, *states]
    for turn in range(len(states) + len(spans) - 1):
        # From the top: then what the layer below has begun last is what this one waits for.
        for index in reversed(range(len(states))):
            n = turn - index
            if 0 <= n < len(spans):
                with lanes.enter(index):
                    found = compute(index, stretches[n], states[index], spans[n])
                stretches[n], states[index] = found
                alive.append(found)
    lanes.leave()
    return torch.cat(stretches), states


class Lanes:
    """A stream for each layer, the caller's for the first; on a CPU nothing."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            caller = torch.cuda.current_stream(device)
            self.streams = [caller, *_others(caller, number - 1)]

    def enter(self, index: int) -> AbstractContextManager:
        """For a stretch of a layer, behind all that the layer below has begun; so behind all that
        the caller has."""
        if not self.streams:
            return nullcontext()
        if index > 0:
            self.streams[index].wait_stream(self.streams[index - 1])
        return torch.cuda.stream(self.streams[index])

    def leave(self) -> None:
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)


_STREAMS: dict[torch.cuda.Stream, list[torch.cuda.Stream]] = {}


def _others(caller: torch.cuda.Stream, number: int) -> list[torch.cuda.Stream]:
    """Always the same ones beside a stream, since each keeps memory of its own."""
    made = _STREAMS.setdefault(caller, [])
    while len(made) < number:
        made.append(torch.cuda.Stream(caller.device))
    return made[:number]
