"""Layers of a stack at the same time, on a GPU.

A layer needs the whole sequence of the one below, but not at once: while it computes a stretch of
time steps, the one below computes the next stretch, on a stream of its own. A recurrence waits for
its own last step and leaves most of a GPU idle, so that others have room beside it. Backward
follows by itself: autograd runs what it differentiates on the stream of its forward, and waits
where one stream takes from another.

Off unless RNNFAST_OVERLAP is set: no GPU has shown yet what it gains. It has a price in bfloat16
and float16, in which the gradient that crosses from stretch to stretch is rounded and those of the
weights are added up over the stretches; and cuBLAS keeps a workspace for each stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..ops import layer
from ..recurrence import precision
from ..recurrence.groups import Options, Rows, States, Weights

ENABLED = os.environ.get("RNNFAST_OVERLAP", "") not in ("", "0")
CALL = 40.0  # microseconds of a stretch beside its time steps, for the host, too; a guess
MOST = 64  # stretches
LEAST_GAIN = 1.2


def steps_of_stretch(T: int, layers: int, window: int | None, step: float, room: int) -> int:
    """How many of T steps a stretch has, 0 where the layers had better come one after another.

    n stretches of ``step`` microseconds a step take (layers + n - 1) times what one does; no less
    than the host's calls, and than ``room`` layers at a time. One is whole windows of truncated
    backpropagation through time.
    """

    def together(steps: int) -> float:
        number = -(-T // steps)
        turns = (layers + number - 1) * (steps * step + CALL)
        return max(turns, layers * number * CALL, layers * T * step / max(room, 1))

    unit = window or 1
    choices = {-(-T // (n * unit)) * unit for n in range(2, MOST + 1)}
    best = min((steps for steps in choices if steps < T), key=together, default=0)
    apart = layers * (T * step + CALL)
    return best if layers > 1 and best and together(best) * LEAST_GAIN < apart else 0


def layers(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Weights],
    rows: Rows,
    residual: bool,
    options: Options,
    backend: str,
    steps: int,
) -> tuple[list[Tensor], Tensor]:
    """The stretches of the output, each [steps, B, H], and h_n [L, B, H], of layers of one
    direction; its input and tensors are those of :func:`rnnfast.ops.layer`, before autocast
    has cast x.

    Args:
        weights: one group per layer.
        residual: a layer's input is added to what the next one gets, where it is as wide.
        steps: of a stretch.
    """
    # Views, so that gradients come to the parameters on the caller's stream.
    views = [_views(own) for own in weights]
    lengths, reset = rows
    first = range(0, x.shape[0], steps)
    left = {t: None if lengths is None else (lengths - t).clamp(0, steps) for t in first}

    def compute(index: int, u: Tensor, h_0: Tensor | None, span: slice) -> tuple[Tensor, Tensor]:
        if span.start == 0:  # views again, so that stretches are added up on the layer's
            views[index] = _views(views[index])
        here, resets = left[span.start], None if reset is None else reset[span]
        if options.bptt_window and span.start:  # an edge, but of rows that have ended
            cut = h_0.detach()
            h_0 = cut if here is None else torch.where(here[:, None] > 0, cut, h_0)
        (cast,) = precision.autocast(u.device.type, u)
        inputs = cast, views[index], States(h_0), Rows(here, resets)
        y, (h_n, _) = layer(*inputs, None, options, backend)
        through = residual and index + 1 < len(views) and y.shape == u.shape
        return (y + u if through else y), h_n

    states = [None] * len(views) if hx is None else list(hx.split(1))
    reads = [*(w for own in views for w in own), *left.values(), reset]
    stretches, states = wavefront(x, states, steps, compute, reads)
    return stretches, torch.cat(states)


def _views(weights: Weights) -> Weights:
    return Weights(*(None if w is None else w.view_as(w) for w in weights))


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
        u: [T, B, I], what the first layer gets.
        states: the first state of each layer.
        steps: of a stretch.
        compute: (layer, its input, its state before, which of the T steps) -> what the layer above
            gets, and the state behind.
        reads: what else it reads, of all layers.
    """
    stretches, states = list(u.split(steps)), list(states)
    spans = [slice(n * steps, n * steps + len(x)) for n, x in enumerate(stretches)]
    with Lanes(u.device, len(states)) as lanes:
        for turn in range(len(states) + len(spans) - 1):
            # From the top: then what the layer below has begun last is what this one waits for.
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
    """A stream for each layer, the caller's for the first; on a CPU nothing. Behind the context the
    caller's waits for all."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            caller = torch.cuda.current_stream(device)
            self.streams = [caller, *_others(caller, number - 1)]

    def __enter__(self) -> Lanes:
        return self

    def enter(self, index: int) -> AbstractContextManager:
        """For a stretch of a layer, behind all that the layer below has begun; so behind all that
        the caller has."""
        if not self.streams:
            return nullcontext()
        if index > 0:
            self.streams[index].wait_stream(self.streams[index - 1])
        return torch.cuda.stream(self.streams[index])

    def hold(self, index: int, *tensors: Tensor | None) -> None:
        """Of what another stream made and this one reads: its memory is not for others before."""
        for x in tensors if self.streams else ():
            if x is not None:
                x.record_stream(self.streams[index])

    def __exit__(self, *_) -> None:
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)


_STREAMS: dict[torch.cuda.Stream, list[torch.cuda.Stream]] = {}


def _others(caller: torch.cuda.Stream, number: int) -> list[torch.cuda.Stream]:
    """Always the same ones beside a stream, since each keeps memory of its own."""
    made = _STREAMS.setdefault(caller, [])
    while len(made) < number:
        made.append(torch.cuda.Stream(caller.device))
    return made[:number]
