"""Triton's kernels, run by its interpreter, against float64: every step of every case."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import NONLINEARITIES, assert_good, judge, make_case, run, run_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from rnnfast.triton_kernels import plan

import rnnfast
from rnnfast.backends import triton as backend
from rnnfast.recurrence import precision
from rnnfast.recurrence.groups import Saved, Wanted
from rnnfast.recurrence.record import FIELDS
from rnnfast.validate.sequences import compare_layers, compare_loops, judged

DTYPES = [torch.float32, torch.float16]
TF32 = 2.0**-11  # the rounding of an operand to 10 bits


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("H", [1, 3, 17, 33, 100, 129])  # of float32 the last is tiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_is_within_its_budget(dtype, H):
    shapes = itertools.product([1, 4], [1, 3, 17], [1, 2])
    for seed, (T, B, D) in enumerate(shapes):
        f = NONLINEARITIES[seed % 3]
        case = make_case(T, B, H, D, dtype, f, seed, lengths=seed % 2 == 0, per_sample=True)
        assert_good(case, run(case, "triton", recorded=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sequence_is_within_its_budget_at_every_step(dtype):
    case = make_case(200, 2, 17, 2, dtype, lengths=True)
    assert_good(case, run(case, "triton"))


CASES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 6),
        "B": st.integers(1, 9),
        "D": st.integers(1, 2),
        "dtype": st.sampled_from(DTYPES),
        "nonlinearity": st.sampled_from(NONLINEARITIES),
        "seed": st.integers(0, 1000),
        "lengths": st.booleans(),
        "heads": st.sampled_from([1, 2, 3]),
        "norm": st.booleans(),
        "reset": st.booleans(),
        "bptt_window": st.sampled_from([None, 1, 3]),
        "clip_state_grad": st.sampled_from([None, 0.5, 5.0]),
        "per_sample": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CASES)
def test_options_in_any_combination(options):
    case = make_case(H=12, **options)
    found = run(case, "triton", recorded=options["per_sample"])
    assert_good(case, found)
    through_autograd = run_functional(case, "triton")
    for name, value in through_autograd.items():
        if value is not None:
            assert torch.equal(value, found[name]), name


@settings(max_examples=20, deadline=None, derandomize=True)
@given(CASES, st.sampled_from([0, 64]))
def test_options_where_a_team_shares_the_units(options, kept):
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, kept)
        case = make_case(H=24, **options)
        assert_good(case, run(case, "triton", recorded=options["per_sample"]))


@pytest.mark.parametrize("kept", [0, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_a_part_at_a_time_or_are_kept(dtype, kept, tiled, monkeypatch):
    """More units than one product takes, more rows than one turn of the only team."""
    keep(monkeypatch, kept, (256, 32, 8))
    options = {"norm": True, "clip_state_grad": 1.0, "reset": True, "lengths": True}
    case = make_case(3, 35, 150, 2, dtype, **options)
    assert_good(case, run(case, "triton"))


@pytest.mark.parametrize("norm", [False, True])
def test_no_parameter_but_what_is_asked_for(norm):
    """No h_0, no bias of the norm, one gradient of the two."""
    case = make_case(4, 3, 9, 2, norm=norm)
    for changed in (
        {"h_0": None},
        {"beta": None},
        {"grad_h_n": None},
        {"grad_y": None},
        {"h_0": None, "grad_y": None},
    ):
        assert_good(case._replace(**changed), run(case._replace(**changed), "triton"))


@pytest.mark.parametrize("norm", [None, "layer"])
def test_no_rows_at_all(norm):
    rnn = rnnfast.RNN(3, 4, bidirectional=True, norm=norm, backend="triton")
    y, h_n = rnn(torch.zeros(5, 0, 3, requires_grad=True))
    (y.sum() + h_n.sum()).backward()
    assert all((p.grad == 0).all() and p.grad.shape == p.shape for p in rnn.parameters())


def test_row_without_steps_counts_for_nothing():
    case = make_case(4, 3, 9, 2)._replace(lengths=torch.tensor([4, 0, 2]))
    wanted = run(case, "triton")["dw_hh"]
    case.h_0[:, 1] = torch.inf
    assert torch.equal(run(case, "triton")["dw_hh"], wanted)


def test_offset_of_the_norm_costs_no_digits():
    """|mean| / std = 1000."""
    case = make_case(4, 3, 33, norm=True)
    case = case._replace(p=case.p + 1000)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_whole_sequences_err_no_more_than_nn_rnn(dtype, nonlinearity):
    """Budget (i) of design.md section 6, of what the kernels compute. dW_hh is one product of
    torch's over all steps, which on a CPU errs more than the sum of nn.RNN's products of a step."""
    cases = [make_case(12, 16, 33, 1, dtype, nonlinearity, seed) for seed in range(5)]
    found = judged(compare_layers(cases, "triton"), cases)
    assert not [str(f) for n, f in found.items() if n != "dw_hh" and not f.good]
    assert "y" in found


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_sequences_under_layer_norm_err_no_more_than_the_eager_loop(dtype):
    cases = [make_case(12, 16, 33, 1, dtype, seed=seed, norm=True) for seed in range(5)]
    found = judged(compare_loops(cases, "triton"), cases)
    assert not [str(f) for n, f in found.items() if n != "dw_hh" and not f.good]


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
    kept = case.kept(y, Saved(None, ahat, found["rstd"]))
    record = torch.empty(2, 3, 2, len(FIELDS), dtype=torch.float64)
    options = case.options._replace(per_sample=True)
    dp, weights, states = backend.backward(case.given, kept, record, Wanted(), options)
    found |= {"dp": dp, "dw_hh": weights.w_hh, "dgamma": weights.gamma, "dbeta": weights.beta}
    found |= {"dh_0": states.h, "record": record}
    assert_good(case.with_options(per_sample=True), found)
