"""Every CUDA kernel on a GPU, whichever the plan takes, judged step by step against float64."""

from __future__ import annotations

import pytest
import torch
from cases import assert_good, make_case, own_rounding, run
from test_gpu_numbers import on

from rnnfast.backends import BACKENDS, Problem, cuda_plan
from rnnfast.recurrence import precision

EVERYTHING = {
    "norm": True,
    "reset": True,
    "lengths": True,
    "bptt_window": 3,
    "clip_state_grad": 0.5,
    "per_sample": True,
}
OPTIONS = {
    "plain": {},
    "clipped": {"clip_state_grad": 0.5, "lengths": True, "per_sample": True},
    "everything": EVERYTHING,
}


# The rounding of an operand where it is not that of the dtype.
MODES = {"exact": None, "tf32": 2.0**-11, "bfloat16": None, "float16": None}
SIZES = [(30, 70), (100, 5), (250, 1), (500, 20), (760, 3), (1270, 9)]


@pytest.mark.gpu(1)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("units", "rows"), SIZES, ids=[f"{u}x{r}" for u, r in SIZES])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [name for name in cuda_plan.NAMES if name])
def test_every_kernel_is_within_its_budget(kernel, mode, units, rows, options, device, monkeypatch):
    monkeypatch.setattr(cuda_plan, "WANTED", (cuda_plan.NAMES[kernel], 0))
    dtype = getattr(torch, mode, torch.float32)
    with precision.tf32(mode == "tf32"):
        problem = Problem(device, dtype, "rnn_tanh", projected=True, units=units, rows=rows)
        why = BACKENDS["cuda"].unavailable(problem)
        if why:
            pytest.skip(why)
        case = on(make_case(5, rows, units, dtype=dtype, **options), device)
        found = run(case, "cuda", recorded=bool(options))
    rounding = {"u_operand": MODES[mode]} if MODES[mode] else own_rounding("cuda", dtype)
    assert_good(case, found, **rounding)
