"""The CUDA kernels, run thread by thread on the host: TF32, the order of the threads, addresses."""

from __future__ import annotations

import random

import pytest
import torch
from cases import assert_good, judge, make_case, run, run_backward
from places import EVERYTHING, TF32

from rnnfast.backends import cuda_plan
from rnnfast.recurrence import precision


@pytest.mark.parametrize("H", [1, 17, 33, 128])
def test_tf32_rounds_operands_and_is_within_its_own_budget(H):
    for options in ({"D": 2}, {**EVERYTHING, "nonlinearity": "relu"}):
        case = make_case(5, 3, H, **options)
        with precision.tf32(True):
            found = run(case, "cuda", recorded="norm" in options)
        assert_good(case, found, u_operand=TF32)
        if H > 1:
            assert any(not verdict.good for verdict in judge(case, found))  # it did round


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
    case = case.with_options(per_sample=True)
    assert_good(case, found | run_backward(case, "cuda", y, ahat, found["rstd"]))


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
