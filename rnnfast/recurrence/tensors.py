"""Shapes, dtypes and memory order of a layer's tensors: what kernels are given and return."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ..cells import CELLS
from .groups import (
    Gradients,
    Kept,
    Options,
    OutputGradients,
    Results,
    Saved,
    States,
    Wanted,
    Weights,
)
from .precision import arithmetic


def check(
    x: Tensor,
    weights: Weights,
    states: States,
    options: Options,
    dtypes: Container[torch.dtype],
) -> None:
    """Checks what the kernels rely on, because a module may hold any tensors as its weights.
    (:mod:`rnnfast.ops` has checked that all are on one device.)

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    w_ih, b_ih, b_hh, w_hh, gamma, beta, _ = weights
    dtype, features, heads = x.dtype, x.shape[2], options.heads
    if dtype not in dtypes:
        raise RuntimeError(f"input: given {dtype}, wanted one of {list(dtypes)}")
    D, G, H = sizes(w_hh, options)
    width = D * G * H
    if w_hh.dim() != 2 or w_hh.shape[0] != width:
        wanted = "a square matrix" if heads == 1 else f"{heads} square matrices, one below another"
        raise RuntimeError(f"weight_hh: given shape {tuple(w_hh.shape)}, wanted {wanted}")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("bias_ih, bias_hh: given one of them, wanted both or neither")
    if w_ih is None and features != width:
        raise RuntimeError(f"p: given {features} features, wanted {width}")
    accurate = arithmetic(dtype)
    for name, value, wanted, shape in (
        ("weight_ih", w_ih, dtype, (width, features)),
        ("bias_ih", b_ih, dtype, (width,)),
        ("bias_hh", b_hh, dtype, (width,)),
        ("weight_hh", w_hh, dtype, w_hh.shape),
        ("norm_weight", gamma, accurate, (width,)),
        ("norm_bias", beta, accurate, (width,)),
        ("h_0", states.h, dtype, (D, x.shape[1], H)),
    ):
        if value is None:
            continue
        if value.dtype is not wanted:
            raise RuntimeError(f"{name}: given {value.dtype}, wanted {wanted} as the input has")
        if value.shape != shape:
            raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


def sizes(w_hh: Tensor, options: Options) -> tuple[int, int, int]:
    """D, G and H."""
    return options.directions, len(CELLS[options.cell].gates), w_hh.shape[-1] * options.heads


def check_backward(given: OutputGradients, kept: Kept, options: Options) -> None:
    """As :func:`check`, for the tensors that backward is given: a saved tensor may come back as
    another one, through torch.autograd.graph.saved_tensors_hooks.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    x, y, (w_ih, _, _, w_hh, gamma, beta, _), states, rows, saved = kept
    # autograd has compared a gradient with the result that it belongs to.
    known = given.states.h if given.y is None else given.y
    dtype = (y if known is None else known).dtype
    points = (y if given.y is None else given.y).shape
    if len(points) != 3:
        raise RuntimeError(f"saved output: given shape {tuple(points)}, wanted [T, B, D * H]")
    T, B, width = points
    D, G, H = sizes(w_hh, options)
    _expect("saved output", y, dtype, points)
    if w_hh.dim() != 2 or w_hh.shape[0] != G * width or width != D * H:
        raise RuntimeError(
            f"saved weight_hh: given shape {tuple(w_hh.shape)}, wanted that of an output with "
            f"{width} features and {options.heads} heads"
        )
    if w_hh.dtype is not dtype:
        _expect("saved weight_hh", w_hh, dtype, w_hh.shape)
    if w_ih is not None:
        features = w_ih.shape[-1] if x is None else x.shape[-1]
        _expect("saved weight_ih", w_ih, dtype, (G * width, features))
        if x is not None:
            _expect("saved input", x, dtype, (T, B, features))
    if given.states.h is not None:
        _expect("gradient of h_n", given.states.h, dtype, (D, B, H))
    if states.h is not None:
        _expect("saved h_0", states.h, dtype, (D, B, H))
    if gamma is not None:
        accurate = arithmetic(dtype)
        for name, value, wanted, shape in (
            ("norm_weight", gamma, accurate, (G * width,)),
            ("norm_bias", beta, accurate, (G * width,)),
            ("ahat", saved.ahat, dtype, (T, B, G * width)),
            ("rstd", saved.rstd, accurate, (T, B, D * options.heads)),
        ):
            if value is not None:
                _expect(f"saved {name}", value, wanted, shape)
    if rows.lengths is not None:
        _expect("saved lengths", rows.lengths, torch.int64, (B,))
    if rows.reset is not None:
        _expect("saved reset", rows.reset, torch.bool, (T, B))


def _expect(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype is not dtype:
        raise RuntimeError(f"{name}: given {value.dtype}, wanted {dtype}")
    if value.shape != shape:
        raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


def empty_results(x: Tensor, weights: Weights, options: Options) -> Results:
    """What forward returns, uninitialised."""
    T, B, _ = x.shape
    D, G, H = sizes(weights.w_hh, options)
    y, h_n, saved = x.new_empty(T, B, D * H), x.new_empty(D, B, H), Saved()
    if weights.gamma is not None:
        rstd = weights.gamma.new_empty(T, B, D * options.heads)
        saved = Saved(None, x.new_empty(T, B, D * G * H), rstd)
    return Results(y, States(h_n), saved)


def empty_gradients(kept: Kept, wanted: Wanted) -> Gradients:
    """What backward returns, uninitialised."""
    y, weights, h_0 = kept.y, kept.weights, kept.states.h
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
        y.new_empty(width) if projects else None,
        torch.empty_like(w_hh, memory_format=torch.contiguous_format) if wanted.weights else None,
        gamma.new_empty(width) if normalizes else None,
        gamma.new_empty(width) if normalizes else None,
    )
    dh_0 = None if h_0 is None else torch.empty_like(h_0, memory_format=torch.contiguous_format)
    return Gradients(dx, of_weights, States(dh_0))


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
