"""Shared by the tests of the kernels, beside the cases of ``python -m rnnfast validate``."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import rnnfast
from rnnfast.backends import BACKENDS, Problem, cpu, cuda_plan, triton
from rnnfast.recurrence.groups import Saved, Wanted
from rnnfast.recurrence.record import FIELDS
from rnnfast.validate.cases import FLOATS, NONLINEARITIES, Case, make_case
from rnnfast.validate.runs import (
    NORM_RESULTS,
    RESULTS,
    gradients_by_name,
    gradients_of,
    judge,
    leaves_of,
    own_rounding,
    run,
    run_differentiated,
)

__all__ = [
    "FLOATS",
    "MODULE_BACKENDS",
    "NONLINEARITIES",
    "NORM_RESULTS",
    "RESULTS",
    "Case",
    "assert_good",
    "examples",
    "has_room",
    "judge",
    "make_case",
    "needs_cpu",
    "own_rounding",
    "run",
    "run_backward",
    "run_differentiated",
    "run_functional",
]

# Without a compiler the package works, and its tests say what they left out. Where the extension
# is required, as in CI, its absence fails.
_required = os.environ.get("RNNFAST_REQUIRE_EXTENSION", "0") not in ("", "0")
_cpu_missing = pytest.mark.skipif(
    cpu._C is None and not _required, reason="the extension rnnfast._C is not built"
)
# Kernels for GPUs run on a CPU in Triton's interpreter and in the emulation alone, which
# `make prove` starts apart.
MODULE_BACKENDS = [
    pytest.param(name, marks=[_cpu_missing] if name == "cpu" else [])
    for name in BACKENDS
    if (name != "triton" or triton.INTERPRETED) and (name != "cuda" or cuda_plan.EMULATION)
]

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


def examples(number: int) -> int:
    """Examples of a test, scaled by the hypothesis profile (conftest.py)."""
    return max(1, number * settings.default.max_examples // 100)


def run_functional(case: Case, backend: str = "cpu") -> dict[str, Tensor | None]:
    """Through rnnfast.functional and autograd: all but the saved values."""
    case, names, leaves = leaves_of(case)
    o = case.options
    common = {
        "lengths": case.lengths, "reset": case.reset, "num_heads": o.heads,
        "bptt_window": o.bptt_window, "clip_state_grad": o.clip_state_grad, "backend": backend,
    }  # fmt: skip
    if o.cell == "lstm":
        common["return_cell_states"] = o.all_cells
        y, (h_n, c_n), *cells = rnnfast.functional.lstm(case.p, case.w_hh, case.states, **common)
        found = {"y": y, "h_n": h_n, "c_n": c_n} | dict(zip(["cells"], cells))
    elif o.cell == "gru":
        b_hn = case.b_hh.view(-1, 3, case.H)[:, 2].flatten()
        y, h_n = rnnfast.functional.gru(case.p, case.w_hh, case.h_0, b_hn=b_hn, **common)
        found = {"y": y, "h_n": h_n}
    else:
        norm = {"norm_weight": case.gamma, "norm_bias": case.beta, "norm_eps": o.norm_eps}
        common |= norm | {"nonlinearity": case.nonlinearity}
        y, h_n = rnnfast.functional.rnn(case.p, case.w_hh, case.h_0, **common)
        found = {"y": y, "h_n": h_n}
    return gradients_of(case, names, leaves, found)


def run_backward(
    case: Case, backend: str, y: Tensor, ahat: Tensor, rstd: Tensor
) -> dict[str, Tensor | None]:
    """The backend's own backward from what forward has saved, and a record of each row."""
    shape = len(case.w_hh), len(y), y.shape[1], len(FIELDS)
    record = torch.empty(shape, dtype=torch.float64, device=y.device)
    kept = case.kept(y, Saved(None, ahat, rstd))
    gradients = BACKENDS[backend].backward(case.given, kept, record, Wanted(), case.options)
    return gradients_by_name(case, gradients) | {"record": record}


def has_room(backend: str, units: int, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Not all of a backend's kernels take a group of any size."""
    problem = Problem(device, dtype, "rnn_tanh", projected=True, units=units)
    return not BACKENDS[backend].unavailable(problem)


def assert_good(case: Case, found: dict[str, Tensor | None], **options) -> None:
    bad = [str(verdict) for verdict in judge(case, found, **options) if not verdict.good]
    shape = tuple(case.p.shape), tuple(case.w_hh.shape)
    assert not bad, f"{shape} {case.p.dtype} {case.options}: " + "; ".join(bad)
