"""The judge finds the faults that a kernel of a cell with gates may have, and nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import FLOATS, Case, assert_good, judge, make_case, needs_cpu, own_rounding, run
from torch import Tensor

from rnnfast.cells import CELLS
from rnnfast.recurrence import loop
from rnnfast.recurrence.clipping import clip

GATED = [name for name, cell in CELLS.items() if cell.saved]
DTYPES = [
    pytest.param(dtype, marks=[] if dtype in (torch.float32, torch.bfloat16) else pytest.mark.proof)
    for dtype in FLOATS
]
Found = dict[str, Tensor | None]


def case_of(cell: str, dtype: torch.dtype) -> Case:
    """All options, rows that begin with a reset, and one whose reset comes late."""
    options = {"heads": 2, "reset": True, "bptt_window": 4, "clip_state_grad": 1.5}
    options |= {"per_sample": True, "all_cells": "c" in CELLS[cell].states}
    case = make_case(9, 5, 8, 2, dtype, cell, seed=3, lengths=True, **options)
    case.lengths[:2] = torch.tensor([9, 4])
    case.reset[0, 2] = True
    case.reset[3, 0] = True
    return case


def backend_of(dtype: torch.dtype) -> str:
    """PyTorch's operations round too often in 16 bits: there the kernels make the results."""
    return "reference" if dtype.itemsize >= 4 else "cpu"


def oracle(case: Case, **changed) -> Found:
    return run(case._replace(**changed), backend_of(case.p.dtype), recorded=True)


def differing(case: Case, **options) -> Found:
    return oracle(case.with_options(**options))


def with_cell(case: Case, **changed) -> Found:
    """Of a cell with other functions."""
    name = case.options.cell
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CELLS, name, CELLS[name]._replace(**changed))
        return oracle(case)


def stepping(case: Case, step) -> Found:
    """step: (right step, its inputs) -> states, saved."""
    right = CELLS[case.options.cell].step
    return with_cell(case, step=lambda *inputs: step(right, *inputs))


def backward_by(case: Case, change) -> Found:
    """change: (right gradients of a step, its inputs) -> wrong ones."""
    right = CELLS[case.options.cell].step_back
    return with_cell(case, step_back=lambda *inputs: change(right(*inputs), *inputs))


def patched(case: Case, name: str, function) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, name, function)
        return oracle(case)


def shifted_gate(case: Case, gate: int) -> Found:
    """One gate's pre-activations of head 0 are off by 1/8."""
    S, G = case.w_hh.shape[2], len(CELLS[case.options.cell].gates)
    p = case.p.clone()
    for d in range(2):
        begin = (d * G + gate) * case.H
        p[..., begin : begin + S] += 0.125
    return oracle(case, p=p)


def gates_swapped(case: Case) -> Found:
    """The first two gates of W_hh, in both directions."""
    w = case.w_hh.clone()
    w[:, : case.H], w[:, case.H : 2 * case.H] = case.w_hh[:, case.H : 2 * case.H], w[:, : case.H]
    return oracle(case, w_hh=w.clone())


def late(found: Found, *names: str, by: int = 1) -> Found:
    return {name: found[name].roll(by, 0) for name in names}


def scaled(found: Found, name: str, by: float = 1.02) -> Found:
    return {name: found[name] * by}


def stale_second_state(case: Case) -> Found:
    """A reset sets h to 0, and leaves c."""
    right, calls = loop.where, []

    def where(mask, value, other):
        if isinstance(value, int) and isinstance(other, Tensor):  # where a reset cuts a state
            calls.append(mask)
            if len(calls) % 2 == 0:
                return other
        return right(mask, value, other)

    return patched(case, "where", where)


def second_gradient_across_a_reset(case: Case) -> Found:
    """A reset stops the gradient of h, and passes that of c."""
    right = loop._Backward.step

    def step(self, s, carries, record):
        da, (dh, _) = right(self, s, carries, record)
        sums, edges = self.sums, self.edges
        rows = self.kept.rows._replace(reset=None)
        self.sums, self.edges = list(sums), loop.Edges(edges.T, rows, case.options.bptt_window)
        _, (_, dc) = right(self, s, carries, None)
        self.sums, self.edges = sums, edges
        return da, (dh, dc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Backward, "step", step)
        return oracle(case)


def one_state_clipped(limit: float, *grads: Tensor) -> tuple[Tensor, ...]:
    return *clip(limit, grads[0]), *grads[1:]


def each_state_clipped(limit: float, *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(g for grad in grads for g in clip(limit, grad))


# What is wrong with a kernel: (the results where it shows, the wrong results)
OF_EACH = {
    "the first gate off": ("y", lambda c, r: shifted_gate(c, 0)),
    "the second gate off": ("y", lambda c, r: shifted_gate(c, 1)),
    "the third gate off": ("y", lambda c, r: shifted_gate(c, 2)),
    "gates swapped": ("y", lambda c, r: gates_swapped(c)),
    "h_0 forgotten": ("y", lambda c, r: oracle(c, h_0=torch.zeros_like(c.h_0))),
    "lengths forgotten": ("y h_n dp", lambda c, r: oracle(c, lengths=None)),
    "reset ignored": ("y dp dw_hh dh_0", lambda c, r: oracle(c, reset=None)),
    "directions swapped": ("y", lambda c, r: {"y": r["y"].roll(8, -1)}),
    "one head": ("y dp", lambda c, r: oracle(c, w_hh=c.w_hh.roll(4, 1))),
    "forward late by a step": ("y", lambda c, r: late(r, "y")),
    "backward late by a step": ("dp", lambda c, r: late(r, "dp", by=-1)),
    "dp of one gate zero": ("dp", lambda c, r: {"dp": zeroed(r["dp"], c)}),
    "grad_y forgotten": ("dp", lambda c, r: oracle(c, grad_y=None)),
    "grad_h_n forgotten": ("dp", lambda c, r: oracle(c, grad_h_n=None)),
    "gradient across the window": ("dp", lambda c, r: differing(c, bptt_window=None)),
    "clip ignored": ("dp", lambda c, r: differing(c, clip_state_grad=None)),
    "clip at twice the limit": ("dp", lambda c, r: differing(c, clip_state_grad=3.0)),
    "dW_hh 2% off": ("dw_hh", lambda c, r: scaled(r, "dw_hh")),
    "dh_0 not carried": ("dh_0", lambda c, r: {"dh_0": r["dh_0"] * 0}),
    "one element not written": (
        "y",
        lambda c, r: {"y": r["y"].where(r["y"] < r["y"].max(), torch.nan)},
    ),
}
LOOP_OF_EACH = {  # of the formulas, in Python alone
    "the direct way back dropped": (
        "dp",
        lambda c, r: backward_by(c, lambda g, *_: g._replace(direct=times(g.direct, 0))),
    ),
    "the direct way back 1% weak": (
        "dp",
        lambda c, r: backward_by(c, lambda g, *_: g._replace(direct=times(g.direct, 0.99))),
    ),
}
OF_LSTM = {
    "the output gate off": ("y", lambda c, r: shifted_gate(c, 3)),
    "c_0 forgotten": ("c_before", lambda c, r: oracle(c, c_0=torch.zeros_like(c.c_0))),
    "c_n a step too early": ("c_n", lambda c, r: {"c_n": r["c_n"] * 0 + r["cells"][1, :, :8]}),
    "cells late by a step": ("cells", lambda c, r: late(r, "cells")),
    "grad_c_n forgotten": ("dp", lambda c, r: oracle(c, grad_c_n=None)),
    "grad of cells forgotten": ("dp", lambda c, r: oracle(c, grad_cells=None)),
    "dc_0 2% off": ("dc_0", lambda c, r: scaled(r, "dc_0")),
}
LOOP_OF_LSTM = {
    "h without tanh of c": ("y", lambda c, r: stepping(c, c_put_out)),
    "f and i swapped": ("y cells", lambda c, r: stepping(c, f_and_i_swapped)),
    "stale c after a reset": ("c_before", lambda c, r: stale_second_state(c)),
    "dc across a reset": ("dp dc_0", lambda c, r: second_gradient_across_a_reset(c)),
    "h alone clipped": ("dp", lambda c, r: patched(c, "clip", one_state_clipped)),
    "each state clipped": ("dp", lambda c, r: patched(c, "clip", each_state_clipped)),
    "dc without its part through h": ("dp", lambda c, r: backward_by(c, dc_alone)),
    "f' of the forget gate forgotten": ("dp", lambda c, r: backward_by(c, no_slope)),
}
OF_GRU = {
    "b_hn forgotten": ("y", lambda c, r: oracle(c, b_hh=c.b_hh * 0)),
    "db_hh 2% off": ("db_hh", lambda c, r: scaled(r, "db_hh")),
}
LOOP_OF_GRU = {
    "z and 1 - z swapped": ("y", lambda c, r: stepping(c, z_swapped)),
    "r before the product's bias": ("y", lambda c, r: stepping(c, bias_outside)),
    "the candidate without r": ("y", lambda c, r: stepping(c, without_r)),
    "du of the candidate without r": (
        "dp dw_hh db_hh",
        lambda c, r: backward_by(c, lambda g, *_: g._replace(du=g.da)),
    ),
    "dz without the state": ("dp", lambda c, r: backward_by(c, dz_of_n_alone)),
}
INPUTS = {"lstm": OF_LSTM, "gru": OF_GRU}
LOOPS = {"lstm": LOOP_OF_LSTM, "gru": LOOP_OF_GRU}


def faults(of_each: dict, by_cell: dict, dtypes: list[torch.dtype]) -> list:
    return [
        pytest.param(
            *(cell, fault, dtype),
            marks=[] if dtype in (torch.float32, torch.bfloat16) else [pytest.mark.proof],
            id=f"{cell}-{fault[0]}-{str(dtype).removeprefix('torch.')}",
        )
        for cell in GATED
        for fault in (of_each | by_cell.get(cell, {})).items()
        for dtype in dtypes
    ]


def zeroed(dp: Tensor, case: Case) -> Tensor:
    dp = dp.clone()
    dp[..., case.H : 2 * case.H] = 0
    return dp


def times(direct: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    return tuple(x * factor for x in direct)


def c_put_out(right, a, u, before, parameters):
    (_, c), saved = right(a, u, before, parameters)
    return (saved[3] * c, c), saved


def f_and_i_swapped(right, a, u, before, parameters):
    return right(a[[1, 0, 2, 3]], u, before, parameters)


def z_swapped(right, a, u, before, parameters):
    return right(a * torch.tensor([1, -1, 1]).to(a).view(3, 1, 1, 1), u, before, parameters)


def bias_outside(right, a, u, before, parameters):
    """As if a part of u_n were in p: r does not reach it."""
    a, u = a.clone(), u.clone()
    a[2] += 0.25
    u[2] -= 0.25
    return right(a, u, before, parameters)


def without_r(right, a, u, before, parameters):
    (_,), (r, a_z, _, u_n) = right(a, u, before, parameters)
    n = (a[2] + u_n).tanh()
    return (n + a_z.sigmoid() * (before[0] - n),), (r, a_z, n, u_n)


def dc_alone(g, grads, before, h, saved, a, parameters):
    """dc without dh o (1 - tanh(c)^2)."""
    da, share = g.da.clone(), grads[1] / g.total
    da[:3] *= share
    return g._replace(da=da, direct=(g.direct[0], g.direct[1] * share), total=grads[1])


def no_slope(g, grads, before, h, saved, a, parameters):
    da = g.da.clone()
    da[1] = g.total * saved[4]
    return g._replace(da=da)


def dz_of_n_alone(g, grads, before, h, saved, a, parameters):
    z, da, du = saved[1].sigmoid(), g.da.clone(), g.du.clone()
    da[1] = du[1] = -grads[0] * saved[2] * z * (1 - z)
    return g._replace(da=da, du=du)


@needs_cpu
@pytest.mark.parametrize(("cell", "fault", "dtype"), faults(OF_EACH, INPUTS, FLOATS))
def test_the_judge_finds_a_fault_of_a_cell_with_gates(cell, fault, dtype):
    assert_found(cell, dtype, *fault[1])


WIDE = [torch.float32, torch.float64]


@pytest.mark.parametrize(("cell", "fault", "dtype"), faults(LOOP_OF_EACH, LOOPS, WIDE))
def test_the_judge_finds_a_fault_of_the_formulas(cell, fault, dtype):
    assert_found(cell, dtype, *fault[1])


def assert_found(cell: str, dtype: torch.dtype, names: str, wrong) -> None:
    case, right = right_of(cell, dtype)
    found = right | wrong(case, right)
    u = own_rounding(backend_of(dtype), dtype)
    bad = {v.name.replace(" ", "_") for v in judge(case, found, **u) if not v.good}
    assert set(names.split()) <= bad


@functools.cache
def right_of(cell: str, dtype: torch.dtype) -> tuple[Case, Found]:
    case = case_of(cell, dtype)
    right = oracle(case)
    assert_good(case, right, **own_rounding(backend_of(dtype), dtype))
    return case, right


SAVED = [(cell, name) for cell in GATED for name in CELLS[cell].saved]


@needs_cpu
@pytest.mark.parametrize(("cell", "name"), SAVED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_finds_a_saved_value_that_is_2_percent_off(dtype, cell, name):
    case = case_of(cell, dtype)
    right = run(case)
    assert_good(case, right)
    values = right["cell_values"].unflatten(2, (4, -1, 4)).clone()  # D * heads, saved, S
    values[:, :, :, CELLS[cell].saved.index(name)] *= 1.02
    verdicts = judge(case, right | {"cell_values": values.flatten(2)})
    bad = {v.name for v in verdicts if not v.good}
    assert {f"saved {name}", "c before" if name == "c_prev" else f"saved {name}"} & bad
    assert any(v.name == "dp" and not v.good for v in verdicts), "backward has read another value"


@needs_cpu
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_finds_one_wrong_step_of_one_row(dtype, cell):
    """Also of the gradient that the direct way back has carried over hundreds of steps."""
    case = make_case(400, 9, 8, 1, dtype, cell, seed=1)
    right = run(case)
    assert_good(case, right)
    for name in ("y", "dp"):
        found = right | {name: right[name].clone()}
        found[name][123, 7] = 0
        (verdict,) = (v for v in judge(case, found) if v.name == name)
        assert not verdict.good
        assert verdict.index[1] == 7
        # A direct way back carries what a zeroed dp has left out to the steps before.
        assert 110 <= verdict.index[0] <= 124


RECORD_FAULTS = {
    "one step off": ("state_norm carry_norm preact_norm gain", lambda r: r.roll(1, 1)),
    "rows swapped": ("state_norm state_max", lambda r: r.flip(2)),
    "directions swapped": ("state_norm gain", lambda r: r.flip(0)),
    "one head": ("gain entries", lambda r: r / 2),
    "not written": ("nonfinite_grad nonfinite_state", lambda r: r * torch.nan),
}
FIELD_FAULTS = {"state_norm": 0, "carry_norm": 1, "clipped_norm": 2, "preact_norm": 3}
FIELD_FAULTS |= {"state_max": 4, "gain": 5}


def scaled_field(record: Tensor, field: int) -> Tensor:
    record = record.clone()
    record[..., field] *= 1.1
    return record


def assert_record_fault(cell: str, dtype: torch.dtype, names: str, wrong) -> None:
    case = case_of(cell, dtype)
    found = run(case, recorded=True)
    assert_good(case, found)
    verdicts = judge(case, found | {"record": wrong(found["record"])})
    bad = {v.name.removeprefix("record.") for v in verdicts if not v.good}
    assert set(names.split()) <= bad


@needs_cpu
@pytest.mark.parametrize("fault", RECORD_FAULTS)
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_finds_a_fault_of_the_record(dtype, cell, fault):
    assert_record_fault(cell, dtype, *RECORD_FAULTS[fault])


@needs_cpu
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_finds_a_field_of_the_record_that_is_off(dtype, cell):
    fields = dict(FIELD_FAULTS)
    if "c" in CELLS[cell].states:
        fields |= {"cell_norm": 10, "cell_carry_norm": 11}
    for name, field in fields.items():
        assert_record_fault(cell, dtype, name, lambda r, field=field: scaled_field(r, field))
