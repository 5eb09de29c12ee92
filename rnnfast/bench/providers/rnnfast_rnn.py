"""rnnfast.RNN, one provider for each of its own backends."""

from __future__ import annotations

from ...backends import BACKENDS, Problem
from ..workload import Data, Workload
from .layer import Layer, differentiated


class RnnfastRNN:
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"rnnfast-{backend}"

    def unavailable(self, work: Workload) -> str:
        beyond = ("norm",) if work.norm else ()
        problem = Problem(work.device, work.dtype, "tanh", projected=False, beyond=beyond)
        return BACKENDS[self.backend].unavailable(problem)

    def build(self, work: Workload, data: Data) -> Layer:
        rnn = work.module(self.backend).to(data.x.device, data.x.dtype)
        rnn.load_state_dict(data.weights)
        lengths = data.lengths
        return differentiated(rnn, lambda x: rnn(x, lengths=lengths), data)
