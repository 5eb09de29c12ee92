"""Judges every provider against float64 before it is timed.

The allowed error is LIMIT times the larger of two errors: that of the eager loop in the same
precision, and that of moving each input by half a unit in the last place. Errors are RMS over rows
and units at the worst time step. nn.RNN's bias gradients, sums over T one by one, err 4.4 times as
much at T = 784. ``python -m rnnfast validate`` judges every element of every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..testing import worst_step
from .providers.layer import Layer, differentiated
from .workload import BOTH, Data, Workload

LIMIT = 16
OUTPUTS = ("y", "h_n", "c_n")
ELEMENTS, PRODUCTS = 5e5, 4e8  # T * B * H and T * B * H^2 at most: float64 is slow


def shortened(work: Workload) -> Workload:
    """The workload with its own H and stack, and with T and B small enough for the judge."""
    rows = max(4, int(min(ELEMENTS / work.H, PRODUCTS / work.H**2)))
    T = min(work.T, max(2, rows // work.B))
    return replace(work, T=T, B=min(work.B, max(1, rows // T)))


class Gate:
    """The judge of one short workload. It computes its own results once."""

    def __init__(self, work: Workload) -> None:
        self.data = work.data().to(work.device, work.dtype)
        exact = self.data.to("cpu", torch.float64)
        self.wanted = _eager(work, exact)
        u = torch.finfo(work.dtype).eps / 2 if work.precision != "tf32" else 2.0**-11
        errors = [
            _errors(_eager(work, self.data), self.wanted),
            _errors(_eager(work, _jittered(exact, u)), self.wanted),
        ]
        self.allowed = {name: LIMIT * max(e[name] for e in errors) for name in self.wanted}

    def complaints(self, layer: Layer) -> list[str]:
        """The results outside their budget; [] if there are none. A layer that only infers has no
        gradients to judge."""
        wanted = self.wanted
        if BOTH not in layer.calls:
            wanted = {name: v for name, v in wanted.items() if name in OUTPUTS}
        errors = _errors(layer.results(), wanted)
        return [
            f"{name}: errs by {error:.2g} (RMS, worst step), allowed {self.allowed[name]:.2g}"
            for name, error in errors.items()
            if not error <= self.allowed[name]  # NaN, too
        ]


def _eager(work: Workload, data: Data) -> Mapping[str, Tensor]:
    rnn = work.module("reference").to(data.x.device, data.x.dtype)
    rnn.load_state_dict(data.weights)
    return differentiated(rnn, lambda x: rnn(x, lengths=data.lengths), data).results()


def _jittered(data: Data, u: float) -> Data:
    """The data times 1 - u or 1 + u, at random."""
    generator = torch.Generator().manual_seed(0)

    def jitter(v: Tensor) -> Tensor:
        sign = torch.randint(2, v.shape, generator=generator, dtype=v.dtype)
        return v * (1 + u * (2 * sign - 1))

    weights = {name: jitter(w) for name, w in data.weights.items()}
    return Data(jitter(data.x), jitter(data.g), data.lengths, weights)


def _errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """{result: error}; infinite if the shape is wrong."""
    errors = {}
    for name, exact in wanted.items():
        value = found[name]
        if value.shape != exact.shape:
            errors[name] = math.inf
            continue
        pair = (value, exact) if name in ("y", "dx") else (value[None], exact[None])
        errors[name] = worst_step([pair]).rms
    return errors
