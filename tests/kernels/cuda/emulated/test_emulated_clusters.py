"""The kernels of clusters, run thread by thread on the host: every configuration that is compiled,
and small ones with every option."""

from __future__ import annotations

import re

import pytest
import torch
from cases import NONLINEARITIES, assert_good, make_case, run, run_functional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import EMULATED, EVERYTHING, TF32, case_of

from rnnfast.backends import cuda_plan
from rnnfast.backends.cuda_plan import KERNELS
from rnnfast.recurrence import precision

DTYPES = {"exact": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = [re.fullmatch(r"cluster(\d+)_(\w+)_(\d+)", name) for name in KERNELS.cuda_kernels()]
CLUSTERS = [(m[2], int(m[3]), int(m[1])) for m in NAMES if m and m[2] in DTYPES]


CLIPPED = {"clip_state_grad": 0.5, "lengths": True, "per_sample": True}


def wanted(monkeypatch: pytest.MonkeyPatch, blocks: int, columns: int = 0) -> None:
    monkeypatch.setattr(cuda_plan, "WANTED", (blocks, columns))


@pytest.mark.parametrize(("mode", "units", "blocks"), CLUSTERS)
def test_every_configuration_is_within_its_budget(mode, units, blocks, monkeypatch):
    """Padded by five units, two columns of three being rows; plain, clipped, and with everything.
    (float16 has the kernels of bfloat16.)"""
    wanted(monkeypatch, blocks, 3)
    for seed, options in enumerate(({}, CLIPPED, EVERYTHING)):
        case = make_case(2, 2, units - 5, 1, DTYPES[mode], "tanh", seed, **options)
        with precision.tf32(mode == "tf32"):
            found = run(case, "cuda", recorded=bool(options))
        assert_good(case, found, **({"u_operand": TF32} if mode == "tf32" else {}))


@pytest.mark.parametrize("blocks", [2, 4, 8])
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(EMULATED.combinations(), st.integers(1, 8))
def test_options_in_any_combination(blocks, monkeypatch, options, columns):
    wanted(monkeypatch, blocks, columns)
    options["H"] = min(options["H"], 60)
    case = case_of(**options)
    found = run(case, "cuda", recorded=options["per_sample"])
    assert_good(case, found)
    for name, value in run_functional(case, "cuda").items():
        if value is not None:
            assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_blocks(dtype, monkeypatch):
    for seed, H in enumerate((1, 33, 250)):
        wanted(monkeypatch, 16, seed)
        case = make_case(3, 4, H, 1, dtype, NONLINEARITIES[seed], seed, **EVERYTHING)
        assert_good(case, run(case, "cuda", recorded=True))


def test_numbers_of_a_row_do_not_depend_on_its_slice(monkeypatch):
    """In bits, for any number of columns."""
    case = make_case(5, 7, 40, 2, torch.float32, **EVERYTHING)
    first = None
    for columns in (1, 3, 8):
        wanted(monkeypatch, 2, columns)
        found = run(case, "cuda", recorded=True)
        first = first or found
        for name in ("y", "h_n", "ahat", "rstd", "dp", "dh_0"):
            assert torch.equal(found[name], first[name]), name


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_too_large_to_be_clipped_late(dtype, blocks, norm, monkeypatch):
    """One row is retried in some steps: before clipping, da or its sums over the units overflow.
    No bit of another row depends on it."""
    wanted(monkeypatch, blocks)
    case = make_case(5, 3, 60, 1, dtype, norm=norm, clip_state_grad=0.5, lengths=True)
    case = case._replace(lengths=torch.tensor([5, 4, 2]))
    times = torch.ones(5, 3, 1, dtype=dtype)
    times[[1, 4], 0] = 1e4 if dtype == torch.float16 else 2e37
    large = case._replace(grad_y=case.grad_y * times)
    found, others = run(large, "cuda"), run(case, "cuda")
    assert_good(large, found)
    for name in ("dp", "dh_0"):
        assert torch.equal(found[name][:, 1:], others[name][:, 1:]), name


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, -1])
def test_limits_far_from_the_gradients(blocks, norm, monkeypatch):
    """The least one, and one that float32 has no number for."""
    wanted(monkeypatch, blocks)
    for limit in (1e-30, 1e-25, 1e40):
        case = make_case(3, 3, 33, 1, torch.float32, norm=norm, clip_state_grad=limit)
        for times in (1.0, 1e4):
            scaled = case._replace(grad_y=case.grad_y * times)
            found = run(scaled, "cuda")
            assert_good(scaled, found)
            if limit < 1:
                assert (found["dp"] != 0).all(), "nothing is lost"
