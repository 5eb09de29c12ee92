"""The CUDA kernels of :mod:`rnnfast._C`, compiled where it was installed: addresses and sizes, on
the current stream.

The projection, and the products over all steps that follow backward, are torch's (cuBLAS).
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..cells import CELLS
from ..compiler import constant
from ..recurrence import products
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
from ..recurrence.precision import rounds_to_tf32
from ..recurrence.tensors import as_bytes, check, dense, empty_results, empty_rows, with_dense_rows
from ..triton_kernels.plan import Device as Facts
from ..triton_kernels.plan import Size, torch_step

if TYPE_CHECKING:
    from . import Problem

try:
    EXTENSION = importlib.import_module("rnnfast._C")
except ImportError:  # the cpu backend says why
    EXTENSION = None

Plan = Any  # rnnfast._C.CudaPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The file of tests/proof/emulation.py: the kernels compute on CPU tensors then, slowly. For tests.
EMULATION = os.environ.get("RNNFAST_EMULATION", "")
# What a plan is told as `Wanted` (csrc/cuda/plan.h).
NAMES = {"": 0, "streaming": -1, "single_block": 1} | {f"cluster{n}": n for n in (2, 4, 8, 16)}


def _wanted() -> tuple[int, ...]:
    """Plans that are not left to the estimate, for tests and benchmarks."""
    name, columns = (os.environ.get(f"RNNFAST_CUDA_{n}", "") for n in ("KERNEL", "COLUMNS"))
    if name not in NAMES:
        raise ValueError(f"RNNFAST_CUDA_KERNEL: given {name!r}, wanted one of {list(NAMES)}")
    if columns and not columns.isdecimal():
        raise ValueError(f"RNNFAST_CUDA_COLUMNS: given {columns!r}, wanted rows of the batch")
    return NAMES[name], int(columns or 0)


WANTED = _wanted()
# What was measured in this process instead, by size and device.
_TUNED: dict[tuple, tuple[int, ...]] = {}


class Device(NamedTuple):
    """Facts of a GPU."""

    name: str
    capability: int  # 10 major + minor
    multiprocessors: int
    shared_memory: int  # bytes a block may have
    clusters: tuple[int, int, int, int] = (0, 0, 0, 0)  # of 2, 4, 8, 16 blocks, at once


def _load() -> ModuleType | None:
    """What has the kernels; None where they were not compiled."""
    if not EMULATION:
        return EXTENSION if hasattr(EXTENSION, "cuda_forward") else None
    loader = importlib.machinery.ExtensionFileLoader("_emulated", EMULATION)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


KERNELS = _load()


def unavailable(problem: Problem) -> str:
    on_gpu = problem.device == "cuda" and torch.version.hip is None
    if not on_gpu and not (EMULATION and problem.device == "cpu"):
        return f"it computes on an NVIDIA GPU, and the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it has no kernel for {problem.dtype}"
    if KERNELS is None:
        return "the extension was built without it; see rnnfast.info()"
    return _refused(*problem.launch)


def plan(problem: Problem) -> str:
    """The launch plan of a problem that it serves, for reading."""
    _, index, dtype, *size = problem.launch
    mode = _mode(dtype)
    tuned = ((mode, *size), _device(problem.device, index, mode)) in _TUNED
    return str(_planned(*problem.launch)) + (", taken by the clock" if tuned else "")


def estimates(problem: Problem) -> tuple[float, float]:
    """Microseconds of a time step of forward: ours, and of torch's kernels."""
    return _estimated(*problem.launch)


def step_beside_others(problem: Problem) -> tuple[float, int]:
    """Microseconds of a time step of forward, and how many such layers run side by side: one where
    the host has a launch to make for each step."""
    kind, index, dtype, *_ = problem.launch
    found = _planned(*problem.launch)
    room = _device(kind, index, _mode(dtype)).multiprocessors // found.blocks
    return found.step, 1 if found.streaming else room


def streams(problem: Problem) -> bool:
    """Whether each of its time steps is a launch: those that keep W_hh have no room for it."""
    return _streams(*problem.launch)


@constant
def _refused(kind: str, index: int | None, *size) -> str:
    if kind == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _planned(kind, index, *size).refused or _unusable(kind, index)


def _unusable(kind: str, index: int | None) -> str:
    """Why the code that was compiled does not run on this device, or with its driver."""
    if EMULATION:
        return ""
    return _code_refused(torch.cuda.current_device() if index is None else index)


@functools.cache
def _code_refused(index: int) -> str:
    with torch.cuda.device(index):
        return KERNELS.cuda_unusable()


@constant
def _estimated(kind: str, index: int | None, dtype: torch.dtype, *size) -> tuple[float, float]:
    units, groups, rows, norm = size
    precision = {"tf32": "tf32", "exact": "tf32x3"}.get(_mode(dtype), "half")
    name, capability, *facts = _device(kind, index, _mode(dtype))
    theirs = torch_step(
        Size(units, groups, rows, precision, norm), Facts(name, divmod(capability, 10), *facts[:2])
    )
    return _planned(kind, index, dtype, *size).step, theirs


@constant
def _streams(*size) -> bool:
    return _planned(*size).streaming


def _planned(
    kind: str,
    index: int | None,
    dtype: torch.dtype,
    units: int,
    groups: int,
    rows: int,
    norm: bool,
):
    """How it is launched, or why not at all."""
    mode = _mode(dtype)
    size, device = (mode, units, groups, rows, norm), _device(kind, index, mode)
    return _plan(*size, device, _TUNED.get((size, device), WANTED))


@functools.lru_cache
def _plan(
    mode: str,
    units: int,
    groups: int,
    rows: int,
    norm: bool,
    device: Device,
    wanted: tuple[int, ...] = (),
):
    return (KERNELS or EXTENSION).cuda_plan(mode, units, groups, rows, norm, *device, *wanted)


def _mode(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32" if rounds_to_tf32() else "exact"
    return str(dtype).removeprefix("torch.")


def _device(kind: str, index: int | None, mode: str) -> Device:
    if EMULATION:
        return Device("the emulation", 90, 1, 227 << 10, (1, 1, 1, 1))
    return _gpu(torch.cuda.current_device() if index is None else index, mode)


@functools.cache
def _gpu(index: int, mode: str) -> Device:
    facts, clusters = torch.cuda.get_device_properties(index), (0, 0, 0, 0)
    # A device or driver that cannot run the kernels cannot be asked about them, either.
    if KERNELS is not None and facts.major >= 9 and not _code_refused(index):
        with torch.cuda.device(index):
            clusters = tuple(KERNELS.cuda_clusters(mode, index))
    return Device(
        facts.name,
        10 * facts.major + facts.minor,
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,
        clusters,
    )


def forward(
    x: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
    *,
    planned: Plan | None = None,
) -> Results:
    """As :func:`rnnfast.backends.cpu.forward`, by a plan of its size or by the one for it."""
    check(x, weights, states, options, DTYPES)
    results = empty_results(x, weights, options)
    y, (h_n, _), (_, ahat, rstd) = results
    p = products.projected(x, weights)
    w_hh, h_0 = dense(weights.w_hh), dense(states.h)
    if x.shape[1] == 0:
        return results
    gamma, beta = dense(weights.gamma), dense(weights.beta)
    kept = w_hh, gamma, beta, h_0, dense(rows.lengths), as_bytes(rows.reset)
    planned = planned or _plan_of(x, w_hh, gamma, options)
    workspace = _workspace(planned, x)
    with _on(x.device):
        KERNELS.cuda_forward(
            planned, options.cell.removeprefix("rnn_"), p.data_ptr(),
            *map(_address, (*kept, y, h_n, ahat, rstd, workspace)), *_shape(y, w_hh, options),
            _paired(w_hh, (p, y), h_0, h_n),
            *p.stride()[:2], *y.stride()[:2], options.norm_eps, *_stream(x.device),
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
    gamma, beta, rstd = kept.weights.gamma, kept.weights.beta, kept.saved.rstd
    y, ahat, grad_y = map(with_dense_rows, (kept.y, kept.saved.ahat, given.y))
    w_hh, grad_h_n, h_0 = map(dense, (kept.weights.w_hh, given.states.h, kept.states.h))
    lengths, reset = map(dense, kept.rows)
    T, B, width = y.shape
    dp = empty_rows(y, width)
    dh_0 = None if h_0 is None else torch.empty_like(h_0)
    carry = None if record is None else y.new_empty(T, B, width, dtype=torch.float32)
    planned = planned or _plan_of(y, w_hh, gamma, options)
    d_norm = None, None
    if gamma is not None and wanted.weights:
        d_norm = gamma.new_empty(2, planned.slices, width).unbind()
    resets = as_bytes(reset)
    if B > 0:
        held = w_hh, dense(gamma), dense(beta), ahat, dense(rstd), lengths
        workspace = _workspace(planned, y)
        with _on(y.device):
            KERNELS.cuda_backward(
                planned, options.cell.removeprefix("rnn_"), _address(grad_y),
                _address(grad_h_n), y.data_ptr(), *map(_address, held), _address(resets),
                dp.data_ptr(), *map(_address, (dh_0, *d_norm, carry, workspace)),
                *_shape(y, w_hh, options), _paired(w_hh, (y, dp, grad_y, ahat), grad_h_n, dh_0),
                *_strides(grad_y), *y.stride()[:2], *_strides(ahat), *dp.stride()[:2],
                *_limits(T, options),
                y.dtype != torch.float32 and CELLS[options.cell].recomputes,
                *_stream(y.device),
            )  # fmt: skip
    if record is not None and record.shape[2]:
        with _on(y.device):
            KERNELS.cuda_measure(
                planned, options.cell.removeprefix("rnn_"),
                *map(_address, (carry, grad_y, grad_h_n, y, dp, lengths, resets, record)),
                options.per_sample, *_shape(y, w_hh, options), *_strides(grad_y),
                *y.stride()[:2], *dp.stride()[:2], *_limits(T, options), *_stream(y.device),
            )  # fmt: skip
    dx, *of_projection = products.projected_back(dp, kept, wanted)
    dw_hh = products.dw_hh(dp, kept, options.heads) if wanted.weights else None
    d_norm = (v if v is None else v.sum(0) for v in d_norm)
    return Gradients(dx, Weights(*of_projection, dw_hh, *d_norm), States(dh_0))


def _plan_of(x: Tensor, w_hh: Tensor, gamma: Tensor | None, options: Options) -> Plan:
    G = w_hh.shape[0] * options.heads
    mode = _mode(x.dtype)
    device = _device(x.device.type, x.device.index, mode)
    size = mode, w_hh.shape[-1], G, x.shape[1], gamma is not None
    if tuning.ENABLED and not any(WANTED) and (size, device) not in _TUNED and x.shape[1] > 0:
        _TUNED[size, device] = _tuned(size, device, x)
    found = _plan(*size, device, _TUNED.get((size, device), WANTED))
    if found.refused:
        raise RuntimeError(f"backend 'cuda' cannot serve: {found.refused}")
    return found


# ------------------------------------------------------------------------------ plans by the clock

TRIED = 2.5  # times the least estimate that a plan that is tried may take
LENGTHS = 64, 256  # time steps of the two calls whose difference is a step's time


def _tuned(size: tuple, device: Device, like: Tensor) -> tuple[int, ...]:
    """The fastest plan of a size, as `Wanted`."""
    plans = KERNELS.cuda_plans(*size, *device)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "RNNFAST_AUTOTUNE: the first call of a size cannot be in the capture of a CUDA graph, "
            f"where nothing can be timed; call {size} once before"
        )
    choices = [plan.wanted for plan in plans if plan.step <= TRIED * plans[0].step]
    return _measured(device.name).best(
        " ".join(map(str, size)), choices, lambda wanted: _seconds(size, device, wanted, like)
    )


@functools.cache
def _measured(name: str) -> tuning.Tuned:
    return tuning.Tuned(name, str(os.stat(KERNELS.__file__).st_mtime_ns))


def _seconds(size: tuple, device: Device, wanted: tuple[int, ...], like: Tensor) -> float:
    """Seconds of a step, forward and backward."""
    return sum(time.step for time in times_of(size, _plan(*size, device, wanted), like))


class Time(NamedTuple):
    """Seconds on the device: of a time step, and of what a call takes beside its steps."""

    step: float
    call: float


def times_of(size: tuple, planned: Plan, like: Tensor, runs: int = 3) -> tuple[Time, Time]:
    """Times of forward and of backward of a layer of zeros, from calls of two lengths. Each call
    counts with the least time of some runs. The recurrence alone: no products over all steps.

    Args:
        size: mode, units, groups, rows, norm.
        like: a tensor of the dtype and device.
    """
    return slopes([_calls(size, planned, like, T) for T in LENGTHS], like.device, runs)


def slopes(
    calls: Sequence[Sequence[Callable[[], object]]], device: torch.device, runs: int = 3
) -> tuple[Time, ...]:
    """Times of calls that differ in their number of time steps alone: a list for each of LENGTHS.
    Each call counts with the least time of some runs."""
    short, long = ([min(timed(f, device) for _ in range(runs)) for f in fs] for fs in calls)
    steps = [(b - a) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(short, long)]
    return tuple(Time(step, a - LENGTHS[0] * step) for step, a in zip(steps, short))


def _calls(
    size: tuple, planned: Plan, like: Tensor, T: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of T steps; both have run once, so that what they load is there."""
    _, S, G, B, norm = size
    x, w_hh = like.new_zeros(T, B, G * S), like.new_zeros(1, G * S, S)
    gamma = like.new_ones(G * S, dtype=torch.float32) if norm else None
    weights, options = Weights(None, None, None, w_hh, gamma, gamma), Options(heads=G)

    def run() -> Results:
        return forward(x, weights, States(), Rows(), options, planned=planned)

    y, _, saved = run()
    given, kept = OutputGradients(y, States()), Kept(None, y, weights, States(), Rows(), saved)

    def run_back() -> None:
        backward(given, kept, None, Wanted(False, False), options, planned=planned)

    run_back()
    return run, run_back


DELAY = 1e-4  # seconds that the device waits first, at least
LONGEST_DELAY = 0.1
CLOCK = 2e9  # cycles a second of a device that waits, at most


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device is busy with what `run` enqueues on the current stream.

    The device is kept waiting until the host has enqueued everything: else the host's own time is
    measured, which is longer than that of a short recurrence.
    """
    if device.type != "cuda":  # the emulation
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    delay = DELAY
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(delay * CLOCK))
        start.record()
        run()
        end.record()
        late = start.query()  # the device went on before the host was done
        end.synchronize()
        if not late or delay >= LONGEST_DELAY:
            return start.elapsed_time(end) / 1e3
        delay *= 4


def _workspace(planned: Plan, like: Tensor) -> Tensor | None:
    """Memory that a launch has beside its tensors: of torch's allocator, which knows the stream."""
    if not planned.workspace:
        return None
    return torch.empty(planned.workspace, dtype=torch.uint8, device=like.device)


def _limits(T: int, options: Options) -> tuple[int, float]:
    """The window and the limit of clipping; 0 for none."""
    return min(options.bptt_window or 0, T), options.clip_state_grad or 0.0


def _shape(y: Tensor, w_hh: Tensor, options: Options) -> tuple[int, ...]:
    T, B, _ = y.shape
    return T, B, w_hh.shape[-1], options.heads, w_hh.shape[0] * options.heads


def _paired(w_hh: Tensor, rows: tuple[Tensor | None, ...], *states: Tensor | None) -> bool:
    """Whether two 16-bit values side by side are one load of 32 bits wherever a thread has them."""
    return (
        w_hh.shape[-1] % 2 == 0
        and all(v.data_ptr() % 4 == 0 for v in (w_hh, *rows, *states) if v is not None)
        and all(v.stride(i) % 2 == 0 for v in rows if v is not None for i in (0, 1))
    )


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()[:2]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _on(device: torch.device) -> AbstractContextManager:
    """torch's way to another GPU and back, which leaves one alone that nobody has used."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream
