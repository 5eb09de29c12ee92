"""The Triton kernels, for NVIDIA GPUs. They need no C++ or CUDA compiler.

torch (cuBLAS) computes the projection, and the products over all steps after backward.
"""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
from ..recurrence.precision import rounds_to_tf32
from ..recurrence.record import FIELDS
from ..recurrence.tensors import as_bytes, dense, empty_results, empty_rows, with_dense_rows
from ..tracing import constant
from ..triton_kernels import arguments as kernel_arguments
from ..triton_kernels.arguments import Form
from ..triton_kernels.plan import Device, Plan, Size, blocks, choose, power_of_two
from .estimates import torch_step

if TYPE_CHECKING:
    from ..triton_kernels.cells.cell import Cell
    from . import Problem

KERNELS_OF = {"rnn_tanh", "rnn_relu", "rnn_sigmoid"}  # the names of cells
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability
OLDEST_TRITON = (3, 6)
MOST_ROWS = 2**30 - 1  # of the batch: kernels count the rows of both directions in 32 bits
# Triton's interpreter runs one program after another on CPU tensors: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# The compiler may use all 255 registers. It would otherwise spill some to make room for a second
# block, for which there is too little shared memory.
COMPILED = {"enable_fp_fusion": True, "maxnreg": 255}


def unavailable(problem: Problem) -> str:
    on_gpu = problem.device == "cuda" and torch.version.hip is None
    if not on_gpu and not (INTERPRETED and problem.device == "cpu"):
        return f"it computes on an NVIDIA GPU, and the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it has no kernel for {problem.dtype}"
    if problem.cell not in KERNELS_OF:
        return f"it has no kernel for the cell {problem.cell}"
    if INTERPRETED and problem.dtype == torch.bfloat16:
        return "Triton's interpreter has no arithmetic in torch.bfloat16"
    found = _planned(*problem.launch)
    return found if isinstance(found, str) else ""


def plan(problem: Problem) -> str:
    """The launch plan of a problem that this backend can run, for reading."""
    return str(_planned(*problem.launch))


def estimates(problem: Problem) -> tuple[float, float]:
    """Microseconds of a time step of forward, estimated: of our kernels, and of torch's."""
    return _estimated(*problem.launch)


@constant
def _planned(
    kind: str,
    index: int | None,
    dtype: torch.dtype,
    units: int,
    groups: int,
    rows: int,
    norm: bool,
) -> Plan | str:
    """The launch plan, or why there is none."""
    if _without_triton():
        return _without_triton()
    if kind == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    device = _device(kind, index)
    if device.capability < OLDEST:
        needed, have = (".".join(map(str, pair)) for pair in (OLDEST, device.capability))
        return f"it needs compute capability {needed}, and {device.name} has {have}"
    if rows > MOST_ROWS:
        return f"{rows} rows of the batch are more than the {MOST_ROWS} that it counts"
    return choose(Size(units, groups, rows, _precision(dtype), norm), device)


@functools.cache
def _without_triton() -> str:
    """Why there is no usable Triton, or ""."""
    try:
        found = importlib.import_module("triton").__version__
    except (ImportError, AttributeError):  # a folder of that name is not Triton
        return "triton is not installed (pip install 'rnnfast[triton]')"
    if _version(found) < OLDEST_TRITON:
        return f"it needs triton {'.'.join(map(str, OLDEST_TRITON))}, and {found} is installed"
    if INTERPRETED and _version(found) < (3, 7):
        numpy = importlib.import_module("numpy").__version__
        if _version(numpy) >= (2, 4):  # which turns no array into a number
            return (
                f"the interpreter of triton 3.6 needs a NumPy below 2.4, and {numpy} is installed"
            )
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


@constant
def _estimated(kind: str, index: int | None, dtype: torch.dtype, *size) -> tuple[float, float]:
    planned = _planned(kind, index, dtype, *size)
    theirs = torch_step(dtype, *size[:3], _device(kind, index).multiprocessors)
    return planned.step, theirs


def forward(
    x: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
) -> Results:
    """As :func:`rnnfast.backends.cpu.forward`."""
    from ..triton_kernels import forward as kernels

    check(x, weights, states, options, DTYPES)
    results = empty_results(x, weights, options)
    y, (h_n, _), (_, ahat, rstd), _ = results
    p = products.projected(x, weights)
    w_hh, gamma = weights.w_hh, weights.gamma
    T, B, _ = x.shape
    if B == 0:
        return results
    plan = _plan(x, w_hh, gamma, options)
    cell = _cell(options)
    form = _form(w_hh, options, _unit(w_hh.shape[-1], p, y))
    arguments = {
        "p_p": p,
        "weights": _weights(weights),
        "p_h_0": dense(states.h),
        "rows": kernel_arguments.Rows(dense(rows.lengths), as_bytes(rows.reset)),
        "results": kernel_arguments.Results(y, h_n, ahat, rstd),
        **{"T": T, "B": B, "eps": options.norm_eps},
        **_strides("p", p, form.UNIT),
        **_strides("y", y, form.UNIT),
        "STEP": cell.step,
    }
    _launch(kernels, plan, form, arguments, 2)
    return results


def backward(
    given: OutputGradients,
    kept: Kept,
    record: Tensor | None,
    wanted: Wanted,
    options: Options,
) -> Gradients:
    """As :func:`rnnfast.backends.cpu.backward`."""
    from ..triton_kernels import backward as kernels

    w_hh, gamma = kept.weights.w_hh, kept.weights.gamma
    y, ahat, grad_y = map(with_dense_rows, (kept.y, kept.saved.ahat, given.y))
    grad_h_n, h_0, lengths, reset = map(dense, (given.states.h, kept.states.h, *kept.rows))
    T, B, width = y.shape
    dp = empty_rows(y, width)
    dh_0 = None if h_0 is None else torch.empty_like(h_0)
    unit = _unit(w_hh.shape[-1], y, dp, *(v for v in (grad_y, ahat) if v is not None))
    cell, limit, window = _cell(options), options.clip_state_grad, options.bptt_window
    form = _form(w_hh, options, unit)._replace(CLIPS=limit is not None, WINDOWED=window is not None)
    sequences = {
        "outside": kernel_arguments.Outside(grad_y, grad_h_n),
        "p_y": y,
        "rows": kernel_arguments.Rows(lengths, as_bytes(reset)),
        **{"T": T, "B": B, "limit": limit or 0.0, "window": window or 0},
        **_strides("g", grad_y, unit),
        **_strides("y", y, unit),
        **_strides("dp", dp, unit),
    }
    carry = None if record is None else dp.new_empty(T, B, width, dtype=torch.float32)
    d_norm = None, None
    if gamma is not None and wanted.weights:
        d_norm = gamma.new_zeros(2, 0, width).unbind()
    if B > 0:
        plan = _plan(y, w_hh, gamma, options)
        if gamma is not None and wanted.weights:
            d_norm = gamma.new_empty(2, plan.slices, width).unbind()
        arguments = sequences | {
            "weights": _weights(kept.weights),
            "normed": kernel_arguments.Normed(ahat, dense(kept.saved.rstd)),
            "gradients": kernel_arguments.Gradients(dp, dh_0, *d_norm, carry),
            **_strides("a", ahat, unit),
            "STEP": cell.step,
            "STEP_BACK": cell.step_back,
        }
        recompute = y.dtype != torch.float32 and CELLS[options.cell].recomputes
        _launch(kernels, plan, form._replace(RECOMPUTE_STATE=recompute), arguments, 6)
    if record is not None:
        measured = sequences | {"p_record": record, "p_carry": carry, "p_dp": dp}
        _measure(measured, form, cell, options.per_sample)
    dx, *of_projection = products.projected_back(dp, kept, wanted)
    dw_hh = products.dw_hh(dp, kept, options) if wanted.weights else None
    d_norm = (v if v is None else v.sum(0) for v in d_norm)
    return Gradients(dx, Weights(*of_projection, dw_hh, *d_norm), States(dh_0))


def _measure(arguments: dict, form: Form, cell: Cell, per_sample: bool) -> None:
    from ..triton_kernels.record import measure

    T, N, B = *arguments["p_record"].shape[1:3], arguments["B"]
    form = form._replace(PRECISION="", BS=min(64, max(16, power_of_two(form.S))), BB=16)
    slices = blocks(B, form.BB)
    arguments = arguments | {
        "slices": 1 if per_sample else slices,
        "FORM": form,
        "GAIN": cell.gain,
        "PER_SAMPLE": per_sample,
        "FIELDS": len(FIELDS),
    }
    if N:
        grid = (T * slices if per_sample else T, form.GROUPS // form.HEADS)
        # A row has ten sums. Where rows begin anywhere, a thread of four warps has eight rows, for
        # which it lacks registers; one of eight warps has four.
        _run(measure, grid, arguments, num_warps=4 if form.UNIT > 1 else 8)


def _plan(x: Tensor, w_hh: Tensor, gamma: Tensor | None, options: Options) -> Plan:
    G = options.directions * options.heads
    size = Size(w_hh.shape[-1], G, x.shape[1], _precision(x.dtype), gamma is not None)
    found = choose(size, _device(x.device.type, x.device.index))
    if isinstance(found, str):
        raise RuntimeError(f"backend 'triton' cannot run this call: {found}")
    return found


def _launch(kernels, plan: Plan, form: Form, arguments: dict, sums: int) -> None:
    """Runs the kernel of the plan. sums: how many numbers a row the programs of a team exchange."""
    weights = arguments["weights"].w
    form = form._replace(SW=weights.shape[-1], BS=plan.block_units, BB=plan.block_rows)
    if plan.kernel == "resident":
        grid = (plan.slices, form.GROUPS)
        _run(kernels.resident, grid, arguments | {"FORM": form}, num_warps=plan.warps)
        return
    form = form._replace(BK=plan.block_products, BP=power_of_two(plan.programs), KEPT=plan.kept)
    shape = plan.teams, sums, form.BP, form.BB
    exchange = kernel_arguments.Exchange(
        torch.zeros(plan.teams, dtype=torch.int64, device=weights.device),
        torch.empty(shape, dtype=torch.float32, device=weights.device),
    )
    numbers = {"programs": plan.programs, "slices": plan.slices, "units": form.S}
    arguments = arguments | numbers | {"exchange": exchange, "FORM": form}
    # All programs run at once, or the launch is an error: they wait for one another.
    options = {"num_warps": plan.warps, "launch_cooperative_grid": True}
    _run(kernels.tiled, (plan.programs, plan.teams), arguments, **options)


def _run(kernel, grid: tuple[int, ...], arguments: dict, **options) -> None:
    tensor = arguments["p_p"] if "p_p" in arguments else arguments["p_y"]
    with _on(tensor.device):
        kernel[grid](**arguments, **COMPILED, **options)


def _on(device: torch.device) -> AbstractContextManager:
    """Makes the device current, because Triton launches there. Its interpreter computes in NumPy:
    there, silences NumPy's warnings."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return importlib.import_module("numpy").errstate(all="ignore")


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if rounds_to_tf32() else "tf32x3"


def _device(kind: str, index: int | None = None) -> Device:
    if INTERPRETED:  # one program at a time
        return Device("Triton's interpreter", OLDEST, 1, 1 << 30)
    return _gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _gpu(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    return Device(
        facts.name,
        (facts.major, facts.minor),
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,
    )


def _cell(options: Options) -> Cell:
    from ..triton_kernels.cells import CELLS

    return CELLS[options.cell]


def _weights(weights: Weights) -> kernel_arguments.Weights:
    w_hh, gamma, beta = weights.w_hh, weights.gamma, weights.beta
    return kernel_arguments.Weights(_padded(w_hh), dense(gamma), dense(beta))


def _padded(w_hh: Tensor) -> Tensor:
    """W_hh as [GROUPS, SW, SW], with zeros beyond S so that every row begins at 16 bytes. Otherwise
    each value would be a load of its own, and the addresses would need too many registers."""
    S = w_hh.shape[-1]
    w_hh = w_hh.reshape(-1, S, S).contiguous()
    gap = -S % (16 // w_hh.element_size())
    if gap or w_hh.data_ptr() % 16:
        return torch.nn.functional.pad(w_hh, (0, gap, 0, gap))
    return w_hh


def _form(w_hh: Tensor, options: Options, unit: int) -> Form:
    """The constants for which all kernels of a call are compiled, before the plan."""
    return Form(
        S=w_hh.shape[-1],
        HEADS=options.heads,
        GROUPS=options.directions * options.heads,
        F=_cell(options).nonlinearity,
        PRECISION=_precision(w_hh.dtype),
        UNIT=unit,
    )


def _unit(S: int, *rows: Tensor) -> int:
    """How many values a vector load may take: 16 bytes of them where all rows begin at 16 bytes,
    otherwise 1."""
    size = rows[0].element_size()
    width = 16 // size
    aligned = S % width == 0 and all(
        v.data_ptr() % 16 == 0 and v.stride(0) % width == 0 and v.stride(1) % width == 0
        for v in rows
    )
    return width if aligned else 1


def _strides(name: str, x: Tensor | None, unit: int) -> dict[str, int]:
    t, b = (0, 0) if x is None else x.stride()[:2]
    return {f"s_{name}_t": t // unit, f"s_{name}_b": b // unit}
