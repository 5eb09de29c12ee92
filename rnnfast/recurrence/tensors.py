"""Shapes and memory order of a layer's tensors: what kernels are given and return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import CELLS
from .groups import Gradients, Kept, Options, Results, Saved, States, Wanted, Weights


def sizes(w_hh: Tensor, options: Options) -> tuple[int, int, int]:
    """D, G and H."""
    return options.directions, len(CELLS[options.cell].gates), w_hh.shape[-1] * options.heads


def empty_results(x: Tensor, weights: Weights, options: Options) -> Results:
    """Results of forward, uninitialised."""
    T, B, _ = x.shape
    D, G, H = sizes(weights.w_hh, options)
    cell = CELLS[options.cell]
    states = States(*(x.new_empty(D, B, H) for _ in cell.states))
    values = ahat = rstd = None
    if cell.saved and options.saves:
        values = x.new_empty(T, B, D * len(cell.saved) * H)
    if weights.gamma is not None:
        ahat = x.new_empty(T, B, D * G * H)
        rstd = weights.gamma.new_empty(T, B, D * options.heads)
    cells = x.new_empty(T, B, D * H) if options.all_cells else None
    return Results(x.new_empty(T, B, D * H), states, Saved(values, ahat, rstd), cells)


def empty_gradients(kept: Kept, wanted: Wanted, options: Options) -> Gradients:
    """Results of backward, uninitialised."""
    y, weights, cell = kept.y, kept.weights, CELLS[options.cell]
    w_ih, w_hh, gamma = weights.w_ih, weights.w_hh, weights.gamma
    projects = wanted.weights and w_ih is not None
    normalizes = wanted.weights and gamma is not None
    width = w_hh.shape[0]
    dx = None
    if wanted.x:
        T, B, _ = y.shape
        dx = y.new_empty(T, B, width if w_ih is None else w_ih.shape[1])
    of_weights = Weights(
        torch.empty_like(w_ih, memory_format=torch.contiguous_format) if projects else None,
        y.new_empty(width) if projects else None,
        y.new_empty(width) if projects or (wanted.weights and cell.apart) else None,
        torch.empty_like(w_hh, memory_format=torch.contiguous_format) if wanted.weights else None,
        gamma.new_empty(width) if normalizes else None,
        gamma.new_empty(width) if normalizes else None,
    )
    states = (
        None if s is None else torch.empty_like(s, memory_format=torch.contiguous_format)
        for s in kept.states
    )
    return Gradients(dx, of_weights, States(*states))


def empty_rows(like: Tensor, width: int) -> Tensor:
    """[T, B, width], uninitialised, time first in memory as nn.RNN's results are: the strides of
    ``like`` never show."""
    return like.new_empty(*like.shape[:2], width)


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, B, width] with 0 where a row has no step: padding may hold anything, and 0 times NaN
    is NaN."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return torch.where((steps < lengths).unsqueeze(2), x, 0)


def with_dense_rows(x: Tensor | None) -> Tensor | None:
    """The kernels take any strides of time and batch, but rows without gaps."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def as_bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def sum_of_biases(b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """b_ih + b_hh. The product gives b_hh a gradient in memory of its own: autograd adds the next
    gradient to a ``.grad`` in place, and does not see that parts of concatenated biases share it.
    """
    return b_ih + 1 * b_hh
