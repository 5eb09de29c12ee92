"""The RNN of Elman (1990): h = f(n), dn = dh f'(n)."""

from __future__ import annotations

import triton
import triton.language as tl

from .cell import Cell
from .nonlinearity import NONLINEARITIES, activation, times_slope


@triton.jit
def step(b_pre, b_carried, F: tl.constexpr):
    return activation(b_pre[0], F), (), ()


@triton.jit
def step_back(b_dh, b_dcarried, b_saved, F: tl.constexpr):
    return (times_slope(b_dh, b_saved[0], F),), ()


@triton.jit
def gain(b_saved, F: tl.constexpr):
    """|f'|."""
    b_h = b_saved[0]
    return tl.abs(times_slope(tl.full(b_h.shape, 1.0, tl.float32), b_h, F))


CELLS = {f"rnn_{f}": Cell(step, step_back, gain, f) for f in NONLINEARITIES}
