"""The CUDA kernels of :mod:`rnnfast._C`, compiled where it was installed, on the current stream.

The projection, and the products over all steps that follow backward, are torch's (cuBLAS).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import tuning
from ..cells import CELLS
from ..recurrence import products
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
from ..recurrence.tensors import as_bytes, dense, empty_results, empty_rows, with_dense_rows
from ..tracing import constant
from . import cuda_clock, cuda_plan
from .cuda_plan import Plan
from .estimates import torch_step

if TYPE_CHECKING:
    from . import Problem

KERNELS_OF = {"rnn_tanh", "rnn_relu", "rnn_sigmoid"}  # the names of cells
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(problem: Problem) -> str:
    on_gpu = problem.device == "cuda" and torch.version.hip is None
    if not on_gpu and not (cuda_plan.EMULATION and problem.device == "cpu"):
        return f"it computes on an NVIDIA GPU, and the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it has no kernel for {problem.dtype}"
    if problem.cell not in KERNELS_OF:
        return f"it has no kernel for the cell {problem.cell}"
    if cuda_plan.KERNELS is None:
        return "the extension was built without it; see rnnfast.info()"
    return _refused(*problem.launch)


def plan(problem: Problem) -> str:
    """The launch plan of a problem that it can run, as text."""
    _, index, dtype, *size = problem.launch
    mode = cuda_plan.mode_of(dtype)
    tuned = ((mode, *size), cuda_plan.device_of(problem.device, index, mode)) in cuda_plan.TUNED
    return str(cuda_plan.planned(*problem.launch)) + (", taken by the clock" if tuned else "")


def estimates(problem: Problem) -> tuple[float, float]:
    """Microseconds of a time step of forward: ours, and of torch's kernels."""
    return _estimated(*problem.launch)


def overlap_capacity(problem: Problem) -> tuple[float, int]:
    """Microseconds of a time step of forward, and how many such layers can run side by side: one
    if each step is a launch, because the host makes the launches one after another."""
    kind, index, dtype, *_ = problem.launch
    found = cuda_plan.planned(*problem.launch)
    cores = cuda_plan.device_of(kind, index, cuda_plan.mode_of(dtype)).multiprocessors
    return found.step, 1 if found.streaming else cores // found.blocks


def streams(problem: Problem) -> bool:
    """Whether each time step is a launch: no kernel that keeps W_hh on the chip has room for it."""
    return _streams(*problem.launch)


@constant
def _refused(kind: str, index: int | None, *size) -> str:
    if kind == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return cuda_plan.planned(kind, index, *size).refused or cuda_plan.unusable(kind, index)


@constant
def _estimated(kind: str, index: int | None, dtype: torch.dtype, *size) -> tuple[float, float]:
    units, groups, rows, _ = size
    cores = cuda_plan.device_of(kind, index, cuda_plan.mode_of(dtype)).multiprocessors
    theirs = torch_step(dtype, units, groups, rows, cores)
    return cuda_plan.planned(kind, index, dtype, *size).step, theirs


@constant
def _streams(*size) -> bool:
    return cuda_plan.planned(*size).streaming


def forward(
    x: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
    *,
    planned: Plan | None = None,
) -> Results:
    """As :func:`rnnfast.backends.cpu.forward`. planned: another plan than the one for the size."""
    check(x, weights, states, options, DTYPES)
    results = empty_results(x, weights, options)
    y, (h_n, _), (_, ahat, rstd), _ = results
    p = products.projected(x, weights)
    w_hh, gamma, beta, h_0 = map(dense, (weights.w_hh, weights.gamma, weights.beta, states.h))
    lengths, reset = dense(rows.lengths), as_bytes(rows.reset)
    if x.shape[1] == 0:
        return results
    planned = planned or _plan_of(x, w_hh, gamma, options)
    workspace = _workspace(planned, x)
    with _on(x.device):
        cuda_plan.KERNELS.cuda_forward(
            planned, **_shape(y, w_hh, options, _paired(w_hh, (p, y), h_0, h_n)),
            norm_eps=options.norm_eps, p=_strided(p), w_hh=w_hh.data_ptr(),
            gamma=_address(gamma), beta=_address(beta), h_0=_address(h_0),
            lengths=_address(lengths), reset=_address(reset),
            y=_strided(y), h_n=h_n.data_ptr(), ahat=_strided(ahat), rstd=_address(rstd),
            workspace=_address(workspace), **_stream(x.device),
        )  # fmt: skip
    return results


def backward(
    given: OutputGradients,
    kept: Kept,
    record: Tensor | None,
    wanted: Wanted,
    options: Options,
    *,
    planned: Plan | None = None,
) -> Gradients:
    """As :func:`rnnfast.backends.cpu.backward`; the plan as in :func:`forward`."""
    y, ahat, grad_y = map(with_dense_rows, (kept.y, kept.saved.ahat, given.y))
    gamma, beta, rstd = map(dense, (kept.weights.gamma, kept.weights.beta, kept.saved.rstd))
    w_hh, grad_h_n, h_0 = map(dense, (kept.weights.w_hh, given.states.h, kept.states.h))
    lengths, reset = dense(kept.rows.lengths), as_bytes(dense(kept.rows.reset))
    T, B, width = y.shape
    dp = empty_rows(y, width)
    dh_0 = None if h_0 is None else torch.empty_like(h_0)
    carry = None if record is None else y.new_empty(T, B, width, dtype=torch.float32)
    planned = planned or _plan_of(y, w_hh, gamma, options)
    dgamma = dbeta = None
    if gamma is not None and wanted.weights:
        dgamma, dbeta = gamma.new_empty(2, planned.slices, width).unbind()
    common = {
        **_shape(y, w_hh, options, _paired(w_hh, (y, dp, grad_y, ahat), grad_h_n, dh_0)),
        **_stream(y.device), "window": min(options.bptt_window or 0, T),
        "clip": options.clip_state_grad or 0.0, "carry": _address(carry),
        "grad_y": _strided(grad_y), "grad_h_n": _address(grad_h_n), "y": _strided(y),
        "dp": _strided(dp), "lengths": _address(lengths), "reset": _address(reset),
    }  # fmt: skip
    if B > 0:
        workspace = _workspace(planned, y)
        with _on(y.device):
            cuda_plan.KERNELS.cuda_backward(
                planned, **common, w_hh=w_hh.data_ptr(), gamma=_address(gamma),
                beta=_address(beta), ahat=_strided(ahat), rstd=_address(rstd),
                recompute_state=y.dtype != torch.float32 and CELLS[options.cell].recomputes,
                dh_0=_address(dh_0), dgamma=_address(dgamma), dbeta=_address(dbeta),
                workspace=_address(workspace),
            )  # fmt: skip
    if record is not None and record.shape[2]:
        with _on(y.device):
            cuda_plan.KERNELS.cuda_measure(
                planned, **common, per_sample=options.per_sample, record=record.data_ptr()
            )
    dx, *of_projection = products.projected_back(dp, kept, wanted)
    dw_hh = products.dw_hh(dp, kept, options) if wanted.weights else None
    of_norm = (v if v is None else v.sum(0) for v in (dgamma, dbeta))
    return Gradients(dx, Weights(*of_projection, dw_hh, *of_norm), States(dh_0))


def _plan_of(x: Tensor, w_hh: Tensor, gamma: Tensor | None, options: Options) -> Plan:
    G = options.directions * options.heads
    mode = cuda_plan.mode_of(x.dtype)
    device = cuda_plan.device_of(x.device.type, x.device.index, mode)
    size = mode, w_hh.shape[-1], G, x.shape[1], gamma is not None
    if (
        tuning.ENABLED
        and not any(cuda_plan.WANTED)
        and (size, device) not in cuda_plan.TUNED
        and x.shape[1] > 0
    ):
        cuda_plan.TUNED[size, device] = cuda_clock.tuned(size, device, x, _calls)
    wanted = cuda_plan.TUNED.get((size, device), cuda_plan.WANTED)
    found = cuda_plan.plan_for(*size, device, wanted)
    if found.refused:
        raise RuntimeError(f"backend 'cuda' cannot run this call: {found.refused}")
    return found


def times_of(
    size: tuple, planned: Plan, like: Tensor, runs: int = 3
) -> tuple[cuda_clock.Time, cuda_clock.Time]:
    """As :func:`rnnfast.backends.cuda_clock.times_of`, of the kernels."""
    return cuda_clock.times_of(size, planned, like, _calls, runs)


def _calls(
    size: tuple, planned: Plan, like: Tensor, T: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of T steps. Both have run once, so that their code is loaded."""
    _, S, G, B, norm = size
    x, w_hh = like.new_zeros(T, B, G * S), like.new_zeros(G * S, S)
    gamma = like.new_ones(G * S, dtype=torch.float32) if norm else None
    weights, options = Weights(None, None, None, w_hh, gamma, gamma), Options(heads=G)

    def run() -> Results:
        return forward(x, weights, States(), Rows(), options, planned=planned)

    y, _, saved, _ = run()
    given, kept = OutputGradients(y, States()), Kept(None, y, weights, States(), Rows(), saved)

    def run_back() -> None:
        backward(given, kept, None, Wanted(False, False), options, planned=planned)

    run_back()
    return run, run_back


def _workspace(planned: Plan, like: Tensor) -> Tensor | None:
    """Memory that a launch needs beside its tensors. torch's allocator knows the stream."""
    if not planned.workspace:
        return None
    return torch.empty(planned.workspace, dtype=torch.uint8, device=like.device)


def _shape(y: Tensor, w_hh: Tensor, options: Options, paired: bool) -> dict[str, Any]:
    T, B, _ = y.shape
    return {
        "cell": options.cell,
        "steps": T,
        "batch": B,
        "size": w_hh.shape[-1],
        "heads": options.heads,
        "groups": options.directions * options.heads,
        "paired": paired,
    }


def _paired(w_hh: Tensor, rows: tuple[Tensor | None, ...], *states: Tensor | None) -> bool:
    """Whether two 16-bit values side by side are one load of 32 bits wherever a thread has them."""
    return (
        w_hh.shape[-1] % 2 == 0
        and all(v.data_ptr() % 4 == 0 for v in (w_hh, *rows, *states) if v is not None)
        and all(v.stride(i) % 2 == 0 for v in rows if v is not None for i in (0, 1))
    )


def _strided(x: Tensor | None) -> tuple[int, int, int] | None:
    """[T, B, N] with a dense last axis."""
    return None if x is None else (x.data_ptr(), *x.stride()[:2])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _on(device: torch.device) -> AbstractContextManager:
    """Makes another GPU current and returns. torch does not start a GPU that nobody has used."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"device": 0, "stream": 0}
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}
