"""The oracle as a backend: any device, any dtype; PyTorch itself differentiates it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import CELLS
from ..recurrence import loop
from ..recurrence.groups import (
    Gradients,
    Kept,
    Options,
    OutputGradients,
    Results,
    Rows,
    Saved,
    States,
    Wanted,
    Weights,
)
from ..recurrence.tensors import sum_of_biases, without_padding

if TYPE_CHECKING:
    from . import Problem


def unavailable(problem: Problem) -> str:
    return ""


def forward(x: Tensor, weights: Weights, states: States, rows: Rows, options: Options) -> Results:
    """As :func:`rnnfast.ops.layer`, with the saved values."""
    x = without_padding(x, rows.lengths)
    p = x
    if weights.w_ih is not None:
        p = F.linear(x, weights.w_ih, _bias(weights, options))
    return loop.forward(p, weights, states, rows, options)


def _bias(weights: Weights, options: Options) -> Tensor | None:
    """b_ih + b_hh, without b_hh of the gates that have it in their recurrent part."""
    if weights.b_ih is None:
        return None
    return sum_of_biases(weights.b_ih, _outside(weights.b_hh, weights, options))


def _outside(b: Tensor, weights: Weights, options: Options) -> Tensor:
    """b [D * G * H] with 0 for the gates that have b_hh in their recurrent part."""
    cell = CELLS[options.cell]
    if not cell.apart:
        return b
    by_gate = b.view(options.directions, len(cell.gates), -1)
    # reshape: is_grads_batched cannot map flatten
    return torch.where(loop.outside(cell, b)[..., 0, 0], by_gate, 0).reshape(-1)


def backward(
    given: OutputGradients,
    kept: Kept,
    record: Tensor | None,
    wanted: Wanted,
    options: Options,
    grad_saved: Saved | None = None,
) -> Gradients:
    """As :func:`rnnfast.backends.cpu.backward`, but functions to differentiate again."""
    dp, inner, states = loop.backward(given, kept, options, record, grad_saved)
    states = States(*(g if s is not None else None for g, s in zip(states, kept.states)))
    nothing = Weights(None, None, None, None)
    inner = inner if wanted.weights else nothing
    w_ih = kept.weights.w_ih
    if w_ih is None:
        return Gradients(dp if wanted.x else None, inner, states)
    dx = dp @ w_ih if wanted.x else None
    if not wanted.weights:
        return Gradients(dx, nothing, states)
    db = dp.sum((0, 1))
    T, B, width = dp.shape  # reshape: is_grads_batched cannot map flatten
    x = without_padding(kept.x, kept.rows.lengths).reshape(T * B, kept.x.shape[2])
    dw_ih = dp.reshape(T * B, width).T @ x
    db_hh = db.clone()
    if inner.b_hh is not None:
        db_hh = _outside(db, kept.weights, options) + inner.b_hh
    return Gradients(dx, inner._replace(w_ih=dw_ih, b_ih=db, b_hh=db_hh), states)
