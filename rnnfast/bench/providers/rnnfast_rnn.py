"""rnnfast's modules, one provider for each of our own backends."""

from __future__ import annotations

from ...backends import BACKENDS, Problem
from ..workload import Data, Workload
from .layer import Layer, differentiated


class RnnfastRNN:
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"rnnfast-{backend}"

    def unavailable(self, work: Workload) -> str:
        return BACKENDS[self.backend].unavailable(problem(work))

    def build(self, work: Workload, data: Data) -> Layer:
        rnn = work.module(self.backend).to(data.x.device, data.x.dtype)
        rnn.load_state_dict(data.weights)
        lengths = data.lengths
        layer = differentiated(rnn, lambda x: rnn(x, lengths=lengths), data)
        layer.estimated_us_per_step = self._estimated(work)
        return layer

    def _estimated(self, work: Workload) -> float | None:
        """The launch plan's estimate for the recurrences of all layers, one after another."""
        estimates = getattr(BACKENDS[self.backend], "estimates", None)
        if estimates is None or work.device != "cuda":  # an emulated kernel has no time
            return None
        return work.layers * estimates(problem(work))[0]


def problem(work: Workload) -> Problem:
    """The problem that the module passes to the choice of a backend."""
    extras = ("norm",) if work.norm else ()
    size = work.H, work.directions, work.B
    return Problem(work.device, work.dtype, work.cell, False, extras, *size)
