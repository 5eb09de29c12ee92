"""The native CPU kernels: addresses and sizes to :mod:`rnnfast._C`, which knows no torch."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cells import CELLS
from ..cores import quota
from ..recurrence.checks import check
from ..recurrence.groups import (
    Gradients,
    Kept,
    Options,
    OutputGradients,
    Results,
    Rows,
    States,
    Wanted,
    Weights,
)
from ..recurrence.tensors import empty_gradients, empty_results, empty_rows, with_dense_rows

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

Order = Callable[[Tensor, Options], Tensor]
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
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
) -> Results:
    """As :func:`rnnfast.ops.layer`, with the saved values."""
    T, B, width = x.shape
    check(x, weights, states, options, DTYPES)
    _bind_threads()
    results = empty_results(x, weights, options)
    y, (h_n, c_n), (values, ahat, rstd), cells = results
    if weights.w_ih is None and weights.b_hh is not None:
        weights = weights._replace(b_hh=_apart(weights.b_hh, options))
    if _by_gate(options):
        weights = _regrouped(weights, options, _heads_first)
        x = x if weights.w_ih is not None else _heads_first(x.movedim(2, 0), options).movedim(0, 2)
    w_ih, b_ih, b_hh, w_hh, gamma, beta, _ = weights
    x = with_dense_rows(x)
    tensors = (w_ih, b_ih, b_hh, w_hh, gamma, beta, *states, *rows)
    held = [v if v is None else v.contiguous() for v in tensors]
    addresses = [v if v is None else v.data_ptr() for v in held]
    w_ih, b_ih, b_hh, w_hh_at, gamma, beta, h_0, c_0, lengths, reset = addresses
    _C.rnn_forward(
        cell=options.cell, dtype=DTYPES[x.dtype],
        steps=T, batch=B, size=w_hh.shape[-1], directions=h_n.shape[0], heads=options.heads,
        threads=torch.get_num_threads(), lengths=lengths, reset=reset,
        p=_strided(x) if w_ih is None else None, x=None if w_ih is None else _strided(x),
        input_size=width, w_ih=w_ih, b_ih=b_ih, w_hh=w_hh_at, b_hh=b_hh, h_0=h_0, c_0=c_0,
        gamma=gamma, beta=beta, norm_eps=options.norm_eps,
        norm_recurrent=False, parameters=None, y=_strided(y), saved=_strided(values),
        cells=_strided(cells), ahat=_strided(ahat), rstd=_address(rstd), h_n=h_n.data_ptr(),
        c_n=_address(c_n),
    )  # fmt: skip
    return results


def backward(
    given: OutputGradients,
    kept: Kept,
    record: Tensor | None,
    wanted: Wanted,
    options: Options,
) -> Gradients:
    """The gradients of a layer from those of its results.

    record: [D, T, N, fields] of :mod:`rnnfast.recurrence.record`, to be filled; or None.
    """
    weights, by_gate = kept.weights, _by_gate(options)
    if by_gate:
        weights = _regrouped(weights, options, _heads_first)
    w_ih, _, _, w_hh, gamma, beta, _ = weights
    y, ahat, rstd = with_dense_rows(kept.y), with_dense_rows(kept.saved.ahat), kept.saved.rstd
    values = with_dense_rows(kept.saved.cell_values)
    T, B, _ = y.shape
    rows = w_hh.shape[0]  # of W_hh, all directions
    gradients = empty_gradients(kept, wanted, options)
    dx, (dw_ih, db_ih, db_hh, dw_hh, dgamma, dbeta, _), (dh_0, dc_0) = gradients
    if db_hh is not None and db_ih is None:
        db_ih = torch.empty_like(db_hh)  # the kernel sums both or neither
    others = dw_ih, db_ih, db_hh, dw_hh, dgamma, dbeta, dh_0, dc_0
    # The kernel has read da of a point by the time it writes dx there: one memory for both, where
    # it is as wide.
    dp = dx if dx is not None and dx.shape[2] == rows else empty_rows(y, rows)
    dx = None if w_ih is None else dx
    du = empty_rows(y, rows) if CELLS[options.cell].apart else None
    grad_y, grad_cells = with_dense_rows(given.y), with_dense_rows(given.cells)
    x = with_dense_rows(kept.x) if w_ih is not None and wanted.weights else None
    tensors = (w_ih, w_hh, gamma, beta, rstd, *kept.states, *kept.rows, *given.states)
    held = [v if v is None else v.contiguous() for v in tensors]
    addresses = [v if v is None else v.data_ptr() for v in held]
    w_ih_at, w_hh_at, gamma, beta, rstd, h_0, _, lengths, reset, grad_h_n, grad_c_n = addresses
    dw_ih, db_ih, db_hh, dw_hh, dgamma, dbeta, dh_0, dc_0 = map(_address, others)
    limit = options.clip_state_grad
    _C.rnn_backward(
        cell=options.cell, dtype=DTYPES[y.dtype],
        steps=T, batch=B, size=w_hh.shape[-1], directions=options.directions, heads=options.heads,
        threads=torch.get_num_threads(), lengths=lengths, reset=reset,
        window=options.bptt_window or 0, clip=math.inf if limit is None else limit,
        grad_y=_strided(grad_y), grad_h_n=grad_h_n, grad_c_n=grad_c_n,
        grad_cells=_strided(grad_cells), y=_strided(y), saved=_strided(values),
        x=_strided(x), input_size=0 if w_ih is None else w_ih.shape[1],
        w_ih=w_ih_at, w_hh=w_hh_at, h_0=h_0, gamma=gamma, beta=beta,
        ahat=_strided(ahat), rstd=rstd, norm_recurrent=False,
        parameters=None, dp=_strided(dp), du=_strided(du), dx=_strided(dx),
        dw_ih=dw_ih, db_ih=db_ih, db_hh=db_hh, dw_hh=dw_hh, dgamma=dgamma, dbeta=dbeta,
        dparameters=None, dh_0=dh_0, dc_0=dc_0, record=_address(record),
        per_sample=options.per_sample,
    )  # fmt: skip
    if by_gate:
        of_weights = _regrouped(gradients.weights, options, _gates_first)
        gradients = gradients._replace(weights=of_weights)
        if w_ih is None and gradients.x is not None:
            dp = _gates_first(gradients.x.movedim(2, 0), options).movedim(0, 2)
            gradients = gradients._replace(x=dp)
    if w_ih is None and gradients.weights.b_hh is not None:
        of_weights = gradients.weights._replace(b_hh=_apart(gradients.weights.b_hh, options))
        gradients = gradients._replace(weights=of_weights)
    return gradients


def _apart(b_hh: Tensor, options: Options) -> Tensor:
    """b_hh [D * G * H] with 0 for the gates that have it in p. A kernel adds all of it to u."""
    cell = CELLS[options.cell]
    kinds = torch.tensor([gate in cell.apart for gate in cell.gates])
    by_gate = b_hh.view(options.directions, len(cell.gates), -1)
    return torch.where(kinds.view(1, -1, 1), by_gate, 0).flatten()


# The kernels take the gates of a head together, rows [D, heads, gates, S]; torch's order is
# [D, gates, heads, S].


def _by_gate(options: Options) -> bool:
    """Whether these orders differ."""
    return options.heads > 1 and len(CELLS[options.cell].gates) > 1


def _heads_first(x: Tensor, options: Options) -> Tensor:
    D, G, n = options.directions, len(CELLS[options.cell].gates), options.heads
    return x.reshape(D, G, n, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _gates_first(x: Tensor, options: Options) -> Tensor:
    D, G, n = options.directions, len(CELLS[options.cell].gates), options.heads
    return x.reshape(D, n, G, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _regrouped(weights: Weights, options: Options, order: Order) -> Weights:
    return Weights(*(None if w is None else order(w, options) for w in weights))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _strided(x: Tensor | None) -> tuple[int, int, int] | None:
    """Address and the first two strides of x [T, B, N]."""
    return None if x is None else (x.data_ptr(), *x.stride()[:2])


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
    """Addresses through which the kernels use torch's own threads: a second pool would fight its
    spinning workers. Zeros where torch is built on another runtime: then the kernels have threads
    of their own."""
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
