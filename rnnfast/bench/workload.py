"""A workload: sizes and precision of a stack of layers, its FLOP, its bytes, its data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..modules import GRU, LSTM, RNN
from ..modules.stack import Stack

FORWARD, BOTH = "forward", "forward+backward"
STEP, GRAPH = "training step", "forward+backward, CUDA graph"
WAYS = (FORWARD, BOTH, STEP, GRAPH)

# Kinds of workloads with scarce cores.
MANY, BUSY = "8 threads a core", "beside busy processes"

PRECISIONS = {  # tf32: float32 tensors; products on a GPU round operands to 10 bits
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


MODULES: dict[str, type[Stack]] = {"rnn_tanh": RNN, "lstm": LSTM, "gru": GRU}


class Data(NamedTuple):
    """The loss is sum(y * g)."""

    x: Tensor  # [T, B, H]
    g: Tensor  # [T, B, D * H]
    lengths: Tensor | None  # [B] int64, on the CPU, the longest first
    weights: dict[str, Tensor]  # by nn.RNN's names; with layer norm also norm_weight_l0, ...

    def to(self, *args, **options) -> Data:
        """Converts x, g and weights with Tensor.to."""
        x, g, lengths, weights = self
        weights = {name: w.to(*args, **options) for name, w in weights.items()}
        return Data(x.to(*args, **options), g.to(*args, **options), lengths, weights)


@dataclass(frozen=True)
class Workload:
    """A stack of layers with I = H and states that begin at 0. ``kind`` says why we measure it."""

    T: int
    B: int
    H: int
    kind: str = "asked for"
    precision: str = "float32"
    layers: int = 1
    directions: int = 1
    norm: str = ""  # or "layer"
    packed: bool = False  # rows of unequal length, from T / 2 to T
    device: str = "cpu"
    cell: str = "rnn_tanh"  # a key of MODULES

    @property
    def size(self) -> tuple[int, int, int]:
        return self.T, self.B, self.H

    @property
    def plain(self) -> bool:
        """One tanh layer in float32 with nothing special."""
        return not self.beyond() and self.cell == "rnn_tanh"

    @property
    def gates(self) -> int:
        return len(CELLS[self.cell].gates)

    def beyond(self) -> list[str]:
        """Differences from a plain layer, in words."""
        return [
            *([] if self.precision == "float32" else [self.precision]),
            *([] if self.layers == 1 else [f"{self.layers} layers"]),
            *([] if self.directions == 1 else ["bidirectional"]),
            *([f"{self.norm} norm"] if self.norm else []),
            *(["packed"] if self.packed else []),
        ]

    def __str__(self) -> str:
        scarce = [self.kind] if self.kind in (MANY, BUSY) else []
        cell = [] if self.cell == "rnn_tanh" else [MODULES[self.cell].__name__]
        return ", ".join([f"({self.T}, {self.B}, {self.H})", *cell, *self.beyond(), *scarce])

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @cached_property
    def lengths(self) -> Tensor | None:
        if not self.packed:
            return None
        return torch.linspace(self.T, max(1, self.T // 2), self.B).round().long()

    @property
    def points(self) -> int:
        """Time steps of all rows."""
        return self.T * self.B if self.lengths is None else int(self.lengths.sum())

    def _widths(self) -> list[int]:
        """Features that each layer reads."""
        return [self.H] + [self.directions * self.H] * (self.layers - 1)

    def flops(self, what: str) -> int:
        """FLOP of projection and recurrence. Each has two more products in backward."""
        forward = sum(
            2 * self.points * self.directions * self.gates * self.H * (i + self.H)
            for i in self._widths()
        )
        return forward if what == FORWARD else 3 * forward

    def bytes(self, what: str) -> int:
        """The bytes that must cross memory. Forward reads x and the weights, and writes y. Backward
        reads g, y, x and the weights, and writes their gradients."""
        width, rows = self.directions * self.H, self.points
        total = 0
        for i in self._widths():
            weights = self.gates * width * (i + self.H + 2)
            total += rows * (i + width) + weights
            if what != FORWARD:
                total += rows * (2 * i + 2 * width) + 2 * weights
        return total * self.dtype.itemsize

    def data(self, seed: int = 0) -> Data:
        """torch's initial weights; x and g are normal. All precisions start from the same numbers,
        in float32 on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x = torch.randn(self.T, self.B, self.H)
            g = torch.randn(self.T, self.B, self.directions * self.H)
            weights = self.module("reference").state_dict()
        return Data(x, g, self.lengths, weights)

    def module(self, backend: str, **options) -> Stack:
        both = {"num_layers": self.layers, "bidirectional": self.directions == 2}
        norm = {"norm": self.norm} if self.norm else {}
        kind = MODULES[self.cell]
        return kind(self.H, self.H, **both, **norm, backend=backend, **options)
