"""The native CPU kernels: addresses and sizes to :mod:`rnnfast._C`, which knows no torch."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Problem

try:
    _C = importlib.import_module("rnnfast._C")
except ImportError as error:
    _C = None
    WHY_MISSING = str(error)

if _C is not None and os.environ.get("RNNFAST_SIMD"):  # for tests: levels differ in speed alone
    try:
        _C.set_simd_level(os.environ["RNNFAST_SIMD"])
    except ValueError as error:
        raise ValueError(f"RNNFAST_SIMD: {error}") from None

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def unavailable(problem: Problem) -> str:
    if problem.device != "cpu":
        return f"it computes on the CPU, and the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it has no kernel for {problem.dtype}"
    if _C is None:
        return f"the extension rnnfast._C is not there ({WHY_MISSING}); see rnnfast.info()"
    return ""


def forward(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`rnnfast.autograd.layer`; y has the memory order of x (time or batch first)."""
    T, B, width = x.shape
    _check(x, w_ih, b_ih, b_hh, w_hh, h_0)
    _bind_openmp()
    y, h_n = empty_results(x, w_hh)
    x = with_dense_rows(x)
    kept = [_contiguous(v) for v in (w_ih, b_ih, b_hh, w_hh, h_0, lengths)]
    w_ih, b_ih, b_hh, w_hh, h_0, lengths = map(_address, kept)
    projects = w_ih != 0
    _C.rnn_forward(
        nonlinearity, DTYPES[x.dtype], 0 if projects else x.data_ptr(),
        x.data_ptr() if projects else 0, w_ih, b_ih, b_hh, w_hh, h_0, y.data_ptr(), h_n.data_ptr(),
        lengths, T, B, h_n.shape[2], h_n.shape[0], 1, width, *x.stride()[:2], *y.stride()[:2],
        torch.get_num_threads(),
    )  # fmt: skip
    return y, h_n


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
    nonlinearity: str,
) -> tuple[Tensor | None, ...]:
    """dx, dw_ih, db_ih, db_hh, dw_hh, dh_0; None where there is none, or where it is not wanted.

    Without w_ih, dx is dp. x is needed for dw_ih alone.
    """
    y = with_dense_rows(y)
    T, B, width = y.shape
    H = w_hh.shape[-1]
    D = w_hh.shape[0] if w_hh.dim() == 3 else 1
    gradients = empty_gradients(y, w_ih, w_hh, h_0, dx_wanted, dw_wanted)
    dx, *others = gradients
    # The kernel has read da of a point by the time it writes dx there: one memory for both, where
    # it is as wide.
    dp = dx if dx is not None and dx.shape[2] == width else empty_rows(y, width)
    dx = None if w_ih is None else dx
    grad_y = None if grad_y is None else with_dense_rows(grad_y)
    x = with_dense_rows(x) if w_ih is not None and dw_wanted else None
    kept = [_contiguous(v) for v in (grad_h_n, w_ih, w_hh, h_0, lengths)]
    grad_h_n, w_ih, w_hh, h_0, lengths = map(_address, kept)
    _C.rnn_backward(
        nonlinearity, DTYPES[y.dtype], _address(grad_y), grad_h_n, y.data_ptr(), _address(x), w_ih,
        w_hh, h_0, lengths, dp.data_ptr(), _address(dx), *map(_address, others), T, B, H, D, 1,
        0 if kept[1] is None else kept[1].shape[1], *_strides(grad_y), *y.stride()[:2],
        *dp.stride()[:2], *_strides(x), *_strides(dx), torch.get_num_threads(),
    )  # fmt: skip
    return gradients


def _check(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
) -> None:
    """The kernels believe what they are told; a module may hold any tensors as its weights. (On the
    CPU they are: :mod:`rnnfast.autograd` has seen to that.)

    Raises:
        RuntimeError: what does not fit together.
    """
    dtype, features = x.dtype, x.shape[2]
    if dtype not in DTYPES:
        raise RuntimeError(f"input: given {dtype}, wanted one of {list(DTYPES)}")
    D = w_hh.shape[0] if w_hh.dim() == 3 else 1
    H = w_hh.shape[-1]
    width = D * H
    if w_hh.dim() not in (2, 3) or w_hh.shape[-2] != H:
        raise RuntimeError(f"weight_hh: given shape {tuple(w_hh.shape)}, wanted a square matrix")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("bias_ih, bias_hh: given one of them, wanted both or neither")
    if w_ih is None and features != width:
        raise RuntimeError(f"p: given {features} features, wanted {width}")
    for name, value, shape in (
        ("weight_ih", w_ih, (width, features)),
        ("bias_ih", b_ih, (width,)),
        ("bias_hh", b_hh, (width,)),
        ("weight_hh", w_hh, w_hh.shape),
        ("h_0", h_0, (D, x.shape[1], H)),
    ):
        if value is None:
            continue
        if value.dtype is not dtype:
            raise RuntimeError(f"{name}: given {value.dtype}, wanted {dtype} as the input has")
        if value.shape != shape:
            raise RuntimeError(f"{name}: given shape {tuple(value.shape)}, wanted {tuple(shape)}")


def empty_results(x: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """y and h_n, uninitialised."""
    D = w_hh.shape[0] if w_hh.dim() == 3 else 1
    H = w_hh.shape[-1]
    return empty_rows(x, D * H), x.new_empty(D, x.shape[1], H)


def empty_gradients(
    y: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """What backward returns, uninitialised."""
    projects = dw_wanted and w_ih is not None
    return (
        empty_rows(y, y.shape[2] if w_ih is None else w_ih.shape[1]) if dx_wanted else None,
        torch.empty_like(w_ih, memory_format=torch.contiguous_format) if projects else None,
        y.new_empty(y.shape[2]) if projects else None,
        y.new_empty(y.shape[2]) if projects else None,
        torch.empty_like(w_hh, memory_format=torch.contiguous_format) if dw_wanted else None,
        None if h_0 is None else torch.empty_like(h_0, memory_format=torch.contiguous_format),
    )


def empty_rows(like: Tensor, width: int) -> Tensor:
    """[T, B, width], uninitialised, time or batch first in memory as ``like`` is."""
    T, B, _ = like.shape
    if like.stride(1) > like.stride(0):
        return like.new_empty(B, T, width).transpose(0, 1)
    return like.new_empty(T, B, width)


def with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides of time and batch, but rows without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()[:2]


@functools.cache
def _bind_openmp() -> None:
    _C.set_openmp(*openmp())


def openmp() -> tuple[int, int, int]:
    """What lends the kernels the threads that torch has: a second pool would fight its spinning
    workers. Zeros where torch has none (built on another runtime): threads of their own."""
    try:
        with open("/proc/self/maps") as maps:
            fields = [line.rstrip("\n").split(maxsplit=5) for line in maps if "libgomp" in line]
    except OSError:
        return 0, 0, 0
    loaded = sorted({f[5] for f in fields if len(f) == 6 and not f[5].endswith(" (deleted)")})
    if not loaded:
        return 0, 0, 0
    home = os.path.dirname(torch.__file__)
    runtime = ctypes.CDLL(min(loaded, key=lambda path: not path.startswith(home)))
    functions = runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
