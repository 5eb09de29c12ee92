"""The native CPU kernels: addresses and sizes to :mod:`rnnfast._C`, which knows no torch."""

from __future__ import annotations

import ctypes
import functools
import importlib
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
    p: Tensor, w_hh: Tensor, h_0: Tensor | None, lengths: Tensor | None, nonlinearity: str
) -> tuple[Tensor, Tensor]:
    """As :func:`rnnfast.cells.rnn.forward`; y has the memory order of p (time or batch first)."""
    T, B, width = p.shape
    D, H, _ = w_hh.shape
    _bind_openmp()
    y = empty_rows(p, width)
    h_n = p.new_empty(D, B, H)
    p = with_dense_rows(p)
    w_hh = w_hh.contiguous()
    h_0 = None if h_0 is None else h_0.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    _C.rnn_forward(
        nonlinearity,
        DTYPES[p.dtype],
        p.data_ptr(),
        w_hh.data_ptr(),
        _address(h_0),
        y.data_ptr(),
        h_n.data_ptr(),
        _address(lengths),
        T,
        B,
        H,
        D,
        1,
        *p.stride()[:2],
        *y.stride()[:2],
        torch.get_num_threads(),
    )
    return y, h_n


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`rnnfast.cells.rnn.backward`; dp has the memory order of y."""
    T, B, _ = y.shape
    D, H, _ = w_hh.shape
    dp = torch.empty_like(y)
    dh_0 = y.new_empty(D, B, H)
    grad_y = None if grad_y is None else with_dense_rows(grad_y)
    grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
    w_hh = w_hh.contiguous()
    dw_hh = torch.empty_like(w_hh)
    h_0 = None if h_0 is None else h_0.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    _C.rnn_backward(
        nonlinearity,
        DTYPES[y.dtype],
        _address(grad_y),
        _address(grad_h_n),
        y.data_ptr(),
        w_hh.data_ptr(),
        _address(h_0),
        _address(lengths),
        dp.data_ptr(),
        dw_hh.data_ptr(),
        dh_0.data_ptr(),
        T,
        B,
        H,
        D,
        1,
        *((0, 0) if grad_y is None else grad_y.stride()[:2]),
        *y.stride()[:2],
        *dp.stride()[:2],
        torch.get_num_threads(),
    )
    return dp, dw_hh, dh_0


def empty_rows(like: Tensor, width: int) -> Tensor:
    """[T, B, width], uninitialised, time or batch first in memory as ``like`` is."""
    T, B, _ = like.shape
    if like.stride(1) > like.stride(0):
        return like.new_empty(B, T, width).transpose(0, 1)
    return like.new_empty(T, B, width)


def with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides of time and batch, but rows without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@functools.cache
def _bind_openmp() -> None:
    _C.set_openmp(*openmp())


def openmp() -> tuple[int, int, int]:
    """What lends the kernels the threads that torch has: a second pool would fight its spinning
    workers. Zeros where torch has none (built on another runtime): threads of their own."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:
        return 0, 0, 0
    if not loaded:
        return 0, 0, 0
    runtime = ctypes.CDLL(min(loaded, key=lambda path: "torch" not in path))
    functions = runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
