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
    lengths = None if lengths is None else lengths.contiguous()
    _C.rnn_backward(
        nonlinearity,
        DTYPES[y.dtype],
        _address(grad_y),
        _address(grad_h_n),
        y.data_ptr(),
        w_hh.data_ptr(),
        _address(lengths),
        dp.data_ptr(),
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
    return dp, recurrent_weight_gradient(dp, y, h_0, lengths, D), dh_0


def recurrent_weight_gradient(
    da: Tensor, y: Tensor, h_0: Tensor | None, lengths: Tensor | None, D: int
) -> Tensor:
    """dW_hh = sum_t da_t^T h_{t-1} of each direction, h_{t-1} as the step saw it: [D, H, H].

    A step past a row's length has da = 0. The step at which a row begins saw h_0: the first one,
    or in the reverse direction the last valid one, whose neighbour in y is a 0.
    """
    T, B, width = y.shape
    H = width // D
    dw = []
    for d in range(D):
        da_d, y_d = da[..., d * H : (d + 1) * H], y[..., d * H : (d + 1) * H]
        after, before = (da_d[:-1], y_d[1:]) if d else (da_d[1:], y_d[:-1])
        after, before = after.reshape(-1, H), before.reshape(-1, H)
        if h_0 is None:
            total = after.T @ before
        else:
            if d and lengths is not None:
                last = (lengths - 1).clamp(min=0)
                began = da_d[last, torch.arange(B, device=da.device)]  # 0 where the length is 0
            else:
                began = da_d[T - 1 if d else 0]
            if da.element_size() < 4:  # one sum, rounded once: what is left may be far smaller
                total = torch.cat([after, began]).T @ torch.cat([before, h_0[d]])
            else:
                total = torch.addmm(after.T @ before, began.T, h_0[d])
        dw.append(total)
    return torch.stack(dw) if D > 1 else dw[0].unsqueeze(0)


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
    """Lends the kernels the thread pool that torch has: a second one would fight its spinning
    workers. Without one (torch built on another runtime) they start threads of their own."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:
        return
    torch_first = sorted(loaded, key=lambda path: "torch" not in path)
    if torch_first:
        gomp_parallel = ctypes.CDLL(torch_first[0]).GOMP_parallel
        _C.set_openmp(ctypes.cast(gomp_parallel, ctypes.c_void_p).value)
