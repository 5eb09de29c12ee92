"""Checks of what kernels rely on: dtypes and shapes, before forward and before backward."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ..cells import CELLS
from .groups import Kept, Options, OutputGradients, States, Weights
from .precision import arithmetic
from .tensors import sizes


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
    apart = bool(CELLS[options.cell].apart) and w_ih is None  # then b_hh may be given alone
    if (b_ih is None) != (b_hh is None) and not apart:
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
        ("c_0", states.c, dtype, (D, x.shape[1], H)),
    ):
        if value is None:
            continue
        if value.dtype is not wanted:
            raise RuntimeError(f"{name}: given {value.dtype}, wanted {wanted} as the input has")
        if value.shape != shape:
            raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


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
    for name, gradient, state in zip(States._fields, given.states, states):
        if gradient is not None:
            _expect(f"gradient of {name}_n", gradient, dtype, (D, B, H))
        if state is not None:
            _expect(f"saved {name}_0", state, dtype, (D, B, H))
    if given.cells is not None:
        _expect("gradient of the cell states", given.cells, dtype, points)
    if saved.cell_values is not None:
        values = len(CELLS[options.cell].saved) * width
        _expect("saved values of the cell", saved.cell_values, dtype, (T, B, values))
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
