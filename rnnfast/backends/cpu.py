"""The native CPU kernels: addresses and sizes to :mod:`rnnfast._C`, which knows no torch."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cells.rnn import Options, directions
from ..cores import quota
from ..recurrence.tensors import check, empty_gradients, empty_results, empty_rows, with_dense_rows

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
    gamma: Tensor | None,
    beta: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As :func:`rnnfast.ops.layer`, and ahat and rstd with layer norm."""
    T, B, width = x.shape
    check(x, w_ih, b_ih, b_hh, w_hh, gamma, beta, h_0, options.heads, DTYPES)
    _bind_threads()
    results = y, h_n, ahat, rstd = empty_results(x, w_hh, gamma, options.heads)
    x = with_dense_rows(x)
    kept = [_contiguous(v) for v in (w_ih, b_ih, b_hh, w_hh, gamma, beta, h_0, lengths, reset)]
    w_ih, *others = map(_address, kept)
    p_or_x = (x.data_ptr(), 0) if w_ih == 0 else (0, x.data_ptr())
    _C.rnn_forward(
        options.nonlinearity, DTYPES[x.dtype], *p_or_x, w_ih, *others, y.data_ptr(),
        h_n.data_ptr(), _address(ahat), _address(rstd), T, B, w_hh.shape[-1], h_n.shape[0],
        options.heads, width, *x.stride()[:2], *y.stride()[:2], options.norm_eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return results


def backward(
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
    record: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """dx, dw_ih, db_ih, db_hh, dw_hh, dgamma, dbeta, dh_0; None where there is none, or where it is
    not wanted.

    Without w_ih, dx is dp. x is needed for dw_ih alone. record: [D, T, N, fields], to be filled.
    """
    y, ahat = with_dense_rows(y), None if ahat is None else with_dense_rows(ahat)
    T, B, width = y.shape
    gradients = empty_gradients(y, w_ih, w_hh, gamma, h_0, dx_wanted, dw_wanted)
    dx, *others = gradients
    # The kernel has read da of a point by the time it writes dx there: one memory for both, where
    # it is as wide.
    dp = dx if dx is not None and dx.shape[2] == width else empty_rows(y, width)
    dx = None if w_ih is None else dx
    grad_y = None if grad_y is None else with_dense_rows(grad_y)
    x = with_dense_rows(x) if w_ih is not None and dw_wanted else None
    kept = [_contiguous(v) for v in (w_ih, w_hh, gamma, beta, rstd, h_0, lengths, reset, grad_h_n)]
    *weights, grad_h_n = map(_address, kept)
    limit = options.clip_state_grad
    _C.rnn_backward(
        options.nonlinearity, DTYPES[y.dtype], _address(grad_y), grad_h_n, y.data_ptr(),
        _address(ahat), _address(x), *weights, dp.data_ptr(), _address(dx), *map(_address, others),
        _address(record), options.per_sample, T, B, w_hh.shape[-1],
        directions(w_hh), options.heads,
        0 if w_ih is None else w_ih.shape[1], *_strides(grad_y), *y.stride()[:2], *_strides(ahat),
        *dp.stride()[:2], *_strides(x), *_strides(dx), options.bptt_window or 0,
        math.inf if limit is None else limit, torch.get_num_threads(),
    )  # fmt: skip
    return gradients


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()[:2]


@functools.cache
def _bind_threads() -> None:
    _C.set_openmp(*openmp())
    _C.set_quota(quota())


def cores() -> int:
    """The most threads that a call takes, however many torch has: one for each core of the
    process's mask, and no more than its quota."""
    if _C is None:
        return os.cpu_count() or 1
    _bind_threads()
    return next(n for n in itertools.count(1) if _C.usable_threads(n + 1)[0] <= n)


def openmp() -> tuple[int, int, int, int]:
    """What lends the kernels the threads that torch has: a second pool would fight its spinning
    workers. Zeros where torch has none (built on another runtime): threads of their own."""
    try:
        with open("/proc/self/maps") as maps:
            fields = [line.rstrip("\n").split(maxsplit=5) for line in maps if "libgomp" in line]
    except OSError:
        return 0, 0, 0, 0
    loaded = sorted({f[5] for f in fields if len(f) == 6 and not f[5].endswith(" (deleted)")})
    if not loaded:
        return 0, 0, 0, 0
    home = os.path.dirname(torch.__file__)
    runtime = ctypes.CDLL(min(loaded, key=lambda path: not path.startswith(home)))
    functions = (
        runtime.GOMP_parallel,
        runtime.omp_get_num_threads,
        runtime.omp_get_thread_num,
        runtime.omp_get_num_procs,
    )
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
