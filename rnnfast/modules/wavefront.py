"""Layers of a stack at the same time, on a GPU.

A layer needs the whole sequence of the layer below, but not at once. While a layer computes a
stretch of time steps, the layer below computes the next stretch on a stream of its own. A
recurrence waits for its own last step and leaves most of a GPU idle, so there is room for others.
Backward needs no code: autograd runs each operation on the stream of its forward, and waits where
one stream reads from another.

Off unless RNNFAST_OVERLAP is set: no GPU has shown yet how much time it saves. It has a price in
bfloat16 and float16: the gradient that crosses from stretch to stretch is rounded, and so are the
sums of the weights' gradients over the stretches. cuBLAS keeps a workspace for each stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ENABLED = os.environ.get("RNNFAST_OVERLAP", "") not in ("", "0")
CALL = 40.0  # microseconds that a stretch takes beside its time steps, on the host, too; a guess
MOST = 64  # stretches
LEAST_GAIN = 1.2


def steps_of_stretch(T: int, layers: int, window: int | None, step: float, room: int) -> int:
    """How many of T steps a stretch has; 0 where the layers had better run one after another.

    n stretches take (layers + n - 1) times as long as one stretch, whose steps take ``step``
    microseconds each. The host's calls and the GPU's room for ``room`` layers at a time are lower
    bounds. A stretch is whole windows of truncated backpropagation through time.
    """

    def together(steps: int) -> float:
        number = -(-T // steps)
        turns = (layers + number - 1) * (steps * step + CALL)
        return max(turns, layers * number * CALL, layers * T * step / max(room, 1))

    unit = window or 1
    choices = {-(-T // (n * unit)) * unit for n in range(2, MOST + 1)}
    best = min((steps for steps in choices if steps < T), key=together, default=0)
    one_by_one = layers * (T * step + CALL)
    return best if layers > 1 and best and together(best) * LEAST_GAIN < one_by_one else 0


Compute = Callable[[int, Tensor, "Tensor | None", slice], tuple[Tensor, Tensor]]


def wavefront(
    u: Tensor,
    states: Sequence[Tensor | None],
    steps: int,
    compute: Compute,
    reads: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """The stretches of the last layer's output, each [steps, B, H], and each layer's last state.

    Args:
        u: [T, B, I], the input of the first layer.
        states: the first state of each layer.
        steps: of a stretch.
        compute: (layer, its input, its state before, which of the T steps) -> the input of the
            layer above, and the state after.
        reads: all other tensors that ``compute`` reads, of all layers.
    """
    stretches, states = list(u.split(steps)), list(states)
    spans = [slice(n * steps, n * steps + len(x)) for n, x in enumerate(stretches)]
    with Lanes(u.device, len(states)) as lanes:
        for turn in range(len(states) + len(spans) - 1):
            # From the top down, so that a layer waits for the stretch that the layer below began
            # in the turn before, and not for the one of this turn.
            for index in reversed(range(len(states))):
                n = turn - index
                if not 0 <= n < len(spans):
                    continue
                with lanes.enter(index):
                    if index > 0:
                        lanes.hold(index, stretches[n], *([] if n else [states[index], *reads]))
                    found = compute(index, stretches[n], states[index], spans[n])
                stretches[n], states[index] = found
    lanes.hold(0, *stretches, *states)
    return stretches, states


class Lanes:
    """A stream for each layer: the caller's for the first, none on a CPU. When the context ends,
    the caller's stream waits for all of them."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            caller = torch.cuda.current_stream(device)
            self.streams = [caller, *_others(caller, number - 1)]

    def __enter__(self) -> Lanes:
        return self

    def enter(self, index: int) -> AbstractContextManager:
        """The stream of a layer. It waits for all work that the layer below has begun, and so for
        the caller's."""
        if not self.streams:
            return nullcontext()
        if index > 0:
            self.streams[index].wait_stream(self.streams[index - 1])
        return torch.cuda.stream(self.streams[index])

    def hold(self, index: int, *tensors: Tensor | None) -> None:
        """Keeps the memory of tensors that another stream made until the stream of layer ``index``
        has read them."""
        for x in tensors if self.streams else ():
            if x is not None:
                x.record_stream(self.streams[index])

    def __exit__(self, *_) -> None:
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)


_STREAMS: dict[torch.cuda.Stream, list[torch.cuda.Stream]] = {}


def _others(caller: torch.cuda.Stream, number: int) -> list[torch.cuda.Stream]:
    """The streams beside the caller's, the same ones each time: a stream keeps memory of its
    own."""
    made = _STREAMS.setdefault(caller, [])
    while len(made) < number:
        made.append(torch.cuda.Stream(caller.device))
    return made[:number]
