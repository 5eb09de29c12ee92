"""The CUDA kernels, run thread by thread on the host, against float64: every step of every case."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from cases import NONLINEARITIES, assert_good, judge, make_case, run, run_functional
from hypothesis import given, settings
from hypothesis import strategies as st

import rnnfast
from rnnfast.backends import cuda as backend
from rnnfast.backends import cuda_plan
from rnnfast.recurrence import precision
from rnnfast.recurrence.record import FIELDS
from rnnfast.validate.sequences import compare_layers, compare_loops, judged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TF32 = 2.0**-11  # the rounding of an operand to 10 bits
EVERYTHING = {
    "norm": True,
    "reset": True,
    "lengths": True,
    "bptt_window": 3,
    "clip_state_grad": 0.5,
    "per_sample": True,
}
SIZES = [(dtype, H) for dtype in DTYPES for H in (1, 3, 17, 33, 100, 128)]
SIZES += [(dtype, H) for dtype in DTYPES[1:] for H in (129, 256)]


@pytest.mark.parametrize(("dtype", "H"), SIZES)
def test_every_step_is_within_its_budget(dtype, H):
    """Every padded size, parts of a slice of eight rows; plain kernels, and with everything."""
    shapes = [(1, 1, 1), (2, 3, 2), (7, 9, 1)] if H < 100 else [(1, 9, 1), (3, 3, 2)]
    for seed, ((T, B, D), options) in enumerate(itertools.product(shapes, ({}, EVERYTHING))):
        case = make_case(T, B, H, D, dtype, NONLINEARITIES[seed % 3], seed, **options)
        assert_good(case, run(case, "cuda", recorded=bool(options)))


@pytest.mark.parametrize("H", [1, 17, 33, 128])
def test_tf32_rounds_operands_and_is_within_its_own_budget(H):
    for options in ({"D": 2}, {**EVERYTHING, "nonlinearity": "relu"}):
        case = make_case(5, 3, H, **options)
        with precision.tf32(True):
            found = run(case, "cuda", recorded="norm" in options)
        assert_good(case, found, u_operand=TF32)
        if H > 1:
            assert any(not verdict.good for verdict in judge(case, found))  # it did round


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sequence_is_within_its_budget_at_every_step(dtype):
    case = make_case(400, 2, 17, 2, dtype, lengths=True)
    assert_good(case, run(case, "cuda"))


CASES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 6),
        "B": st.integers(1, 17),
        "H": st.sampled_from([6, 12, 30, 66]),
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


@settings(max_examples=120, deadline=None, derandomize=True)
@given(CASES)
def test_options_in_any_combination(options):
    case = make_case(**options)
    found = run(case, "cuda", recorded=options["per_sample"])
    assert_good(case, found)
    through_autograd = run_functional(case, "cuda")
    for name, value in through_autograd.items():
        if value is not None:
            assert torch.equal(value, found[name]), name


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
        assert_good(case._replace(**changed), run(case._replace(**changed), "cuda"))


@pytest.mark.parametrize("norm", [None, "layer"])
def test_no_rows_at_all(norm):
    rnn = rnnfast.RNN(3, 4, bidirectional=True, norm=norm, backend="cuda")
    y, h_n = rnn(torch.zeros(5, 0, 3, requires_grad=True))
    (y.sum() + h_n.sum()).backward()
    assert all((p.grad == 0).all() and p.grad.shape == p.shape for p in rnn.parameters())


def test_row_without_steps_counts_for_nothing():
    case = make_case(4, 3, 9, 2)._replace(lengths=torch.tensor([4, 0, 2]))
    wanted = run(case, "cuda")["dw_hh"]
    case.h_0[:, 1] = torch.inf
    assert torch.equal(run(case, "cuda")["dw_hh"], wanted)


def test_offset_of_the_norm_costs_no_digits():
    """|mean| / std = 1000."""
    for H in (33, 128):
        case = make_case(4, 3, H, norm=True)
        case = case._replace(p=case.p + 1000)
        assert_good(case, run(case, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_state_stays_what_it_is(dtype):
    """In ReLU, with padded units beside it and, in float32, split into parts of which two are 0."""
    case = make_case(3, 2, 5, dtype=dtype, nonlinearity="relu")
    w_hh = torch.eye(5, dtype=dtype)[None]
    w_hh[0, 1, 0] = 1.0
    h_0 = torch.zeros_like(case.h_0)
    h_0[0, 0, 0] = torch.inf
    case = case._replace(w_hh=w_hh, h_0=h_0, p=torch.zeros_like(case.p))
    found, wanted = run(case, "cuda")["y"], run(case, "reference")["y"]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert found.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_whole_sequences_err_no_more_than_nn_rnn(dtype, nonlinearity):
    """Budget (i) of design.md section 6, of what the kernels compute. dW_hh is one product of
    torch's over all steps, which on a CPU errs more than the sum of nn.RNN's products of a step."""
    cases = [make_case(12, 16, 33, 1, dtype, nonlinearity, seed) for seed in range(5)]
    found = judged(compare_layers(cases, "cuda"), cases)
    assert not [str(f) for n, f in found.items() if n != "dw_hh" and not f.good]
    assert "y" in found


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_sequences_under_layer_norm_err_no_more_than_the_eager_loop(dtype):
    cases = [make_case(12, 16, 33, 1, dtype, seed=seed, norm=True) for seed in range(5)]
    found = judged(compare_loops(cases, "cuda"), cases)
    assert not [str(f) for n, f in found.items() if n != "dw_hh" and not f.good]


# ------------------------------------------------------------------------------- order and memory


@pytest.mark.parametrize(("dtype", "H"), [(torch.float32, 33), (torch.bfloat16, 100)])
def test_the_order_of_the_threads_changes_no_bit(dtype, H):
    case = make_case(5, 9, H, dtype=dtype, **EVERYTHING)
    found = []
    for seed in random.Random(1).sample(range(1 << 30), 8):
        cuda_plan.KERNELS.set_seed(seed)
        found.append(run(case, "cuda", recorded=True))
    for other in found[1:]:
        assert all(torch.equal(other[n], x) for n, x in found[0].items() if x is not None)


def apart(x: torch.Tensor, unit: int = 8) -> torch.Tensor:
    """The same values, steps and rows so far apart that 32 bits do not count the elements: memory
    that nobody touches is never there."""
    return torch.empty_strided(x.shape, (2**30 + unit, 2**28, 1), dtype=x.dtype).copy_(x)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 8), (torch.float16, 1), (None, 4)])
def test_elements_beyond_32_bits(dtype, unit):
    torch.use_deterministic_algorithms(False)  # it would fill what lies between
    case = make_case(3, 2, 8, 2, dtype or torch.float32, norm=True, reset=True)
    case = case._replace(p=apart(case.p, unit), grad_y=apart(case.grad_y, unit))
    found = run(case, "cuda")
    y, ahat = (apart(found[name], unit) for name in ("y", "ahat"))
    given = (case.h_0, case.lengths, case.reset)
    saved = (y, None, None, case.w_hh, case.gamma, case.beta, ahat, found["rstd"])
    record = torch.empty(2, 3, 2, len(FIELDS), dtype=torch.float64)
    options = case.options._replace(per_sample=True)
    gradients = backend.backward(
        case.grad_y, case.grad_h_n, *saved, *given, record, True, True, options
    )
    names = ("dp", None, None, None, "dw_hh", "dgamma", "dbeta", "dh_0")
    found |= {n: g for n, g in zip(names, gradients) if n}
    assert_good(case.with_options(per_sample=True), found | {"record": record})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_at_odd_addresses(dtype):
    """No pair of 16-bit values is a load of 32 bits there."""
    case = make_case(4, 3, 12, 2, dtype, **EVERYTHING)

    def odd(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].view(x.shape).copy_(x)

    moved = case._replace(**{n: odd(getattr(case, n)) for n in ("p", "w_hh", "h_0", "grad_y")})
    found, wanted = (run(c, "cuda", recorded=True) for c in (moved, case))
    assert all(torch.equal(found[n], x) for n, x in wanted.items() if x is not None)


def test_what_tensor_cores_cut_off_does_not_gather():
    """Positive weights and states: every rounding toward zero would have the same sign, 30 times
    the error of float32 after 60 steps. What is left comes from within single products."""
    generator = torch.Generator().manual_seed(1)
    w_hh = torch.rand(1, 128, 128, generator=generator)
    w_hh *= 0.98 / torch.linalg.matrix_norm(w_hh, 2)
    case = make_case(60, 8, 128, nonlinearity="relu")
    case = case._replace(w_hh=w_hh, p=case.p.abs(), h_0=case.h_0.abs())
    exact = run(case._replace(p=case.p.double(), w_hh=w_hh.double(), h_0=case.h_0.double()), "cpu")
    ours, theirs = (
        (run(case, backend)["y"].double() - exact["y"]).square().mean((1, 2)).sqrt().max()
        for backend in ("cuda", "cpu")
    )
    assert ours < 4 * theirs
