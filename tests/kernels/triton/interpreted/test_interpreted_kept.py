"""Triton's tiled kernels, run by its interpreter: weights that are kept, teams, TF32, addresses."""

from __future__ import annotations

import pytest
import torch
from cases import assert_good, judge, make_case, run, run_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from places import INTERPRETED, TF32, case_of
from rnnfast.triton_kernels import plan

from rnnfast.backends import triton as backend
from rnnfast.recurrence import precision

pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")
DTYPES = INTERPRETED.dtypes


@pytest.fixture
def tiled(monkeypatch):
    """A device on which no program has room for all weights."""
    small = plan.Device("small", (8, 0), 1, 320 << 10)
    monkeypatch.setattr(backend, "_device", lambda *_: small)
    monkeypatch.setattr(plan, "RESIDENT_UNITS", {2: 0, 4: 0})


def keep(monkeypatch, units: int, tile: tuple[int, int, int] = plan.KEPT_TILE) -> None:
    """The tiled kernel with its weights kept up to so many units, in every precision."""
    monkeypatch.setattr(plan, "RESIDENT_UNITS", {2: 0, 4: 0})
    monkeypatch.setattr(plan, "KEPT_UNITS", {8: dict.fromkeys(("half", "tf32", "tf32x3"), units)})
    monkeypatch.setattr(plan, "KEPT_TILE", tile)
    plan.choose.cache_clear()


@settings(max_examples=20)
@given(INTERPRETED.combinations(), st.sampled_from([0, 64]))
def test_options_where_a_team_shares_the_units(options, kept):
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, kept)
        case = case_of(**options | {"H": 24})
        assert_good(case, run(case, "triton", recorded=options["per_sample"]))


@pytest.mark.parametrize("kept", [0, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_a_part_at_a_time_or_are_kept(dtype, kept, tiled, monkeypatch):
    """More units than one product takes, more rows than one turn of the only team."""
    keep(monkeypatch, kept, (256, 32, 8))
    options = {"norm": True, "clip_state_grad": 1.0, "reset": True, "lengths": True}
    case = make_case(3, 35, 150, 2, dtype, **options)
    assert_good(case, run(case, "triton"))


@pytest.mark.parametrize("kept", [False, True])
def test_tf32_rounds_operands_and_is_within_its_own_budget(kept, monkeypatch):
    if kept:
        keep(monkeypatch, 64)
    case = make_case(20, 3, 33, D=2, norm=True)
    exact = run(case, "triton")
    assert_good(case, exact)
    with precision.tf32(True):
        found = run(case, "triton")
    assert_good(case, found, u_operand=TF32)
    assert any(not verdict.good for verdict in judge(case, found))  # it did round


def test_tf32_takes_a_nan_for_a_nan():
    """Also the one of all ones, which an addition to its bits would turn into a zero."""
    case = make_case(3, 2, 4)
    bits = torch.full_like(case.p, -1, dtype=torch.int32)
    with precision.tf32(True):
        y = run(case._replace(h_0=bits[:1].view(torch.float32)), "triton")["y"]
    assert y.isnan().all()


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, steps and rows so far apart that 32 bits do not count the elements: memory
    that nobody touches is never there."""
    return torch.empty_strided(x.shape, (2**30 + 8, 2**28, 1), dtype=x.dtype).copy_(x)


@pytest.mark.parametrize("units", [8, 150])  # resident, tiled
def test_elements_beyond_32_bits(units, monkeypatch):
    torch.use_deterministic_algorithms(False)  # it would fill what lies between
    case = make_case(3, 2, units, 2, torch.float16, norm=True, reset=True)
    if units > 8:
        keep(monkeypatch, 0)
    case = case._replace(p=apart(case.p), grad_y=apart(case.grad_y))
    found = run(case, "triton")
    y, ahat = (apart(found[name]) for name in ("y", "ahat"))
    case = case.with_options(per_sample=True)
    assert_good(case, found | run_backward(case, "triton", y, ahat, found["rstd"]))
