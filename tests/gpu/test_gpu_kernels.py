"""Every CUDA kernel on a GPU, whichever the plan takes, judged step by step against float64."""

from __future__ import annotations

import pytest
from cases import FLOATS, assert_good, make_case, own_rounding, run
from test_gpu_numbers import on

from rnnfast.backends import BACKENDS, Problem, cuda

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


@pytest.mark.gpu(1)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("units", "rows"), [(30, 70), (250, 1), (500, 20), (760, 3), (1270, 9)])
@pytest.mark.parametrize("kernel", [name for name in cuda.NAMES if name])
def test_every_kernel_is_within_its_budget(
    kernel, units, rows, dtype, options, device, monkeypatch
):
    monkeypatch.setattr(cuda, "WANTED", (cuda.NAMES[kernel], 0))
    problem = Problem(device, dtype, "tanh", projected=True, units=units, rows=rows)
    why = BACKENDS["cuda"].unavailable(problem)
    if why:
        pytest.skip(why)
    case = on(make_case(5, rows, units, dtype=dtype, **options), device)
    found = run(case, "cuda", recorded=bool(options))
    assert_good(case, found, **own_rounding("cuda", dtype))
