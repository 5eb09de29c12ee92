"""The streaming kernel, run thread by thread on the host: every block that is compiled, every
option."""

from __future__ import annotations

import json

import pytest
import torch
from cases import assert_good, make_case, run, run_functional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import EMULATED, EVERYTHING, TF32, case_of

from rnnfast.backends import cuda as backend
from rnnfast.backends import cuda_clock, cuda_plan
from rnnfast.backends.cuda_plan import KERNELS, NAMES
from rnnfast.recurrence import precision

MODES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MODES |= {"tf32": torch.float32, "exact": torch.float32}
BLOCKS = [n.split("_")[1:] for n in KERNELS.cuda_kernels() if n.startswith("streaming_")]


def wanted(monkeypatch: pytest.MonkeyPatch, rows: int = 0) -> None:
    monkeypatch.setattr(cuda_plan, "WANTED", (NAMES["streaming"], rows))


@pytest.mark.parametrize(("mode", "block"), BLOCKS)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_block_is_within_its_budget(mode, block, options, monkeypatch):
    """With tiles and slices past the last that are there, and a part of the last ones."""
    rows = int(block.split("x")[1])
    wanted(monkeypatch, rows)
    case = make_case(3, rows + 9, 37, 1, MODES[mode], "tanh", rows, **options)
    with precision.tf32(mode == "tf32"):
        found = run(case, "cuda", recorded=bool(options))
    assert_good(case, found, **({"u_operand": TF32} if mode == "tf32" else {}))


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(EMULATED.combinations(), st.sampled_from([8, 16, 32]))
def test_options_in_any_combination(monkeypatch, options, rows):
    wanted(monkeypatch, rows)
    options["H"] = min(options["H"], 60)
    case = case_of(**options)
    found = run(case, "cuda", recorded=options["per_sample"])
    assert_good(case, found)
    for name, value in run_functional(case, "cuda").items():
        if value is not None:
            assert torch.equal(value, found[name]), name


def test_more_units_than_any_other_kernel_has(monkeypatch):
    wanted(monkeypatch)
    case = make_case(3, 2, 1301, 1, torch.bfloat16, "sigmoid", 1, norm=True)
    assert_good(case, run(case, "cuda"))


def test_numbers_of_a_row_do_not_depend_on_its_block(monkeypatch):
    """In bits."""
    case = make_case(4, 19, 40, 2, torch.float32, **EVERYTHING)
    first = None
    for rows in (8, 16, 32):
        wanted(monkeypatch, rows)
        found = run(case, "cuda", recorded=True)
        first = first or found
        for name in ("y", "h_n", "ahat", "rstd", "dp", "dh_0"):
            assert torch.equal(found[name], first[name]), name


def test_clipping_of_gradients_whose_sums_float32_has_not(monkeypatch):
    """With layer norm its sums are taken before the norm is known."""
    found = {}
    for kernel in ("single_block", "streaming"):
        monkeypatch.setattr(cuda_plan, "WANTED", (NAMES[kernel], 0))
        case = make_case(2, 3, 64, 1, torch.float32, norm=True, clip_state_grad=1.0)
        found[kernel] = run(case._replace(grad_y=case.grad_y * 2e37), "cuda")
    for name, value in found["streaming"].items():
        if value is not None:
            torch.testing.assert_close(value, found["single_block"][name], msg=name)


def test_plans_by_the_clock(monkeypatch, tmp_path):
    """RNNFAST_AUTOTUNE: here it is the emulation's time, for whatever that says."""
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(backend.tuning, "ENABLED", True)
    monkeypatch.setattr(cuda_clock, "LENGTHS", (1, 2))
    monkeypatch.setattr(cuda_clock, "TRIED", 1.3)
    monkeypatch.setattr(cuda_plan, "TUNED", {})
    cuda_clock._measured.cache_clear()
    case = make_case(2, 3, 20, 1, torch.bfloat16, "relu", 1, norm=True)
    assert_good(case, run(case, "cuda"))
    ((size, chosen),) = cuda_plan.TUNED.items()
    assert size[0] == ("bfloat16", 20, 1, 3, True)
    kept = json.loads((tmp_path / "the-emulation.json").read_text())["plans"]
    assert kept == {"bfloat16 20 1 3 True": str(chosen)}
    assert chosen in {plan.wanted for plan in KERNELS.cuda_plans(*size[0], *size[1])}
    cuda_clock._measured.cache_clear()
