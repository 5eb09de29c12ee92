"""What a layer's recurrence is given and what it returns: shapes, dtypes, order in memory."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ..cells.rnn import directions
from .precision import arithmetic


def check(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    h_0: Tensor | None,
    heads: int,
    dtypes: Container[torch.dtype],
) -> None:
    """The kernels believe what they are told; a module may hold any tensors as its weights. (They
    are on one device: :mod:`rnnfast.ops` has seen to that.)

    Raises:
        RuntimeError: what does not fit together.
    """
    dtype, features = x.dtype, x.shape[2]
    if dtype not in dtypes:
        raise RuntimeError(f"input: given {dtype}, wanted one of {list(dtypes)}")
    D = directions(w_hh)
    H = w_hh.shape[-1] * heads
    width = D * H
    if w_hh.dim() not in (2, 3) or w_hh.shape[-2] != H:
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
        ("h_0", h_0, dtype, (D, x.shape[1], H)),
    ):
        if value is None:
            continue
        if value.dtype is not wanted:
            raise RuntimeError(f"{name}: given {value.dtype}, wanted {wanted} as the input has")
        if value.shape != shape:
            raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


def check_backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    ahat: Tensor | None,
    rstd: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> None:
    """As :func:`check`, of what backward is given: a saved tensor may come back as another one,
    through torch.autograd.graph.saved_tensors_hooks.

    Raises:
        RuntimeError: what does not fit together.
    """
    # A gradient comes from autograd, which has compared it with the result that it is of.
    known = grad_h_n if grad_y is None else grad_y
    dtype = (y if known is None else known).dtype
    points = (y if grad_y is None else grad_y).shape
    if len(points) != 3:
        raise RuntimeError(f"saved output: given shape {tuple(points)}, wanted [T, B, D * H]")
    T, B, width = points
    D = directions(w_hh)
    H = w_hh.shape[-1] * heads
    _expect("saved output", y, dtype, points)
    if w_hh.dim() not in (2, 3) or w_hh.shape[-2] != H or width != D * H:
        raise RuntimeError(
            f"saved weight_hh: given shape {tuple(w_hh.shape)}, wanted that of an output with "
            f"{width} features and {heads} heads"
        )
    if w_hh.dtype is not dtype:
        _expect("saved weight_hh", w_hh, dtype, w_hh.shape)
    if w_ih is not None:
        features = w_ih.shape[-1] if x is None else x.shape[-1]
        _expect("saved weight_ih", w_ih, dtype, (width, features))
        if x is not None:
            _expect("saved input", x, dtype, (T, B, features))
    if grad_h_n is not None:
        _expect("gradient of h_n", grad_h_n, dtype, (D, B, H))
    if h_0 is not None:
        _expect("saved h_0", h_0, dtype, (D, B, H))
    if gamma is not None:
        accurate = arithmetic(dtype)
        for name, value, wanted, shape in (
            ("norm_weight", gamma, accurate, (width,)),
            ("norm_bias", beta, accurate, (width,)),
            ("ahat", ahat, dtype, points),
            ("rstd", rstd, accurate, (T, B, D * heads)),
        ):
            if value is not None:
                _expect(f"saved {name}", value, wanted, shape)
    if lengths is not None:
        _expect("saved lengths", lengths, torch.int64, (B,))
    if reset is not None:
        _expect("saved reset", reset, torch.bool, (T, B))


def _expect(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype is not dtype:
        raise RuntimeError(f"{name}: given {value.dtype}, wanted {dtype}")
    if value.shape != shape:
        raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


def empty_results(
    x: Tensor, w_hh: Tensor, gamma: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, ahat and rstd, uninitialised."""
    T, B, _ = x.shape
    D = directions(w_hh)
    H = w_hh.shape[-1] * heads
    y, h_n = empty_rows(x, D * H), x.new_empty(D, B, H)
    if gamma is None:
        return y, h_n, None, None
    return y, h_n, empty_rows(x, D * H), gamma.new_empty(T, B, D * heads)


def empty_gradients(
    y: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    gamma: Tensor | None,
    h_0: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """What backward returns, uninitialised."""
    projects = dw_wanted and w_ih is not None
    normalizes = dw_wanted and gamma is not None
    return (
        empty_rows(y, y.shape[2] if w_ih is None else w_ih.shape[1]) if dx_wanted else None,
        torch.empty_like(w_ih, memory_format=torch.contiguous_format) if projects else None,
        y.new_empty(y.shape[2]) if projects else None,
        y.new_empty(y.shape[2]) if projects else None,
        torch.empty_like(w_hh, memory_format=torch.contiguous_format) if dw_wanted else None,
        gamma.new_empty(y.shape[2]) if normalizes else None,
        gamma.new_empty(y.shape[2]) if normalizes else None,
        None if h_0 is None else torch.empty_like(h_0, memory_format=torch.contiguous_format),
    )


def empty_rows(like: Tensor, width: int) -> Tensor:
    """[T, B, width], uninitialised, time first in memory as nn.RNN's results are: the strides of
    ``like`` never show."""
    return like.new_empty(*like.shape[:2], width)


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, B, width] with 0 where a row has no step: what stands there may be anything, and 0
    times NaN is NaN."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return torch.where((steps < lengths).unsqueeze(2), x, 0)


def with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides of time and batch, but rows without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def as_bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)
