"""The results of a GPU, judged step by step against float64; float32 without TF32."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOATS,
    NONLINEARITIES,
    Case,
    assert_good,
    has_room,
    make_case,
    own_rounding,
    run,
    run_functional,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same_results, results, twins

import rnnfast
from rnnfast.backends import cuda, torch_native, triton

SIZES = {  # T, B, H
    "one unit": (3, 2, 1),
    "one step": (1, 3, 17),
    "odd": (9, 7, 33),
    "one row": (33, 1, 129),
    "many rows": (4, 130, 64),
    "wide": (4, 3, 650),
    "long": (150, 2, 8),
}
OPTIONS = {
    "lengths, reset": {"D": 2, "lengths": True, "reset": True},
    "window, clip": {"bptt_window": 4, "clip_state_grad": 0.5, "lengths": True},
    "norm": {"D": 2, "norm": True, "lengths": True},
    "norm of heads": {"D": 2, "norm": True, "heads": 3, "reset": True, "clip_state_grad": 0.5},
}


def on(case: Case, device: str) -> Case:
    return Case(*(x if x is None else x.to(device) for x in case[:-1]), case.options)


def run_module(case: Case, backend: str) -> dict[str, torch.Tensor | None]:
    """Through rnnfast.RNN, with W_ih = I and no biases, so that dx is dp to the bit."""
    H, like = case.w_hh.shape[1], {"device": case.p.device, "dtype": case.p.dtype}
    rnn = rnnfast.RNN(H, H, 1, case.nonlinearity, bias=False, backend=backend, **like)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(H))
        rnn.weight_hh_l0.copy_(case.w_hh[0])
    x, h_0 = (v.detach().requires_grad_() for v in (case.p, case.h_0))
    y, h_n = rnn(x, h_0, lengths=case.lengths)
    outputs, leaves = (y, h_n), (x, rnn.weight_hh_l0, h_0)
    dp, dw_hh, dh_0 = torch.autograd.grad(outputs, leaves, (case.grad_y, case.grad_h_n))
    found = {"y": y.detach(), "h_n": h_n.detach(), "dp": dp, "dw_hh": dw_hh[None], "dh_0": dh_0}
    return found | dict.fromkeys(("ahat", "rstd", "dgamma", "dbeta"))


def rounding(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """cuDNN does not say what it computes 16 bits in."""
    return own_rounding("reference" if backend == "torch" else backend, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_within_its_budget(size, dtype, own_backend, device):
    if not has_room(own_backend, SIZES[size][2], dtype, device):
        pytest.skip("more units than its kernels have room for")
    case = on(make_case(*SIZES[size], dtype=dtype), device)
    assert_good(case, run_functional(case, own_backend), **own_rounding(own_backend, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_within_its_budget(options, dtype, own_backend, device):
    case = on(make_case(9, 5, 24, dtype=dtype, **OPTIONS[options]), device)
    found = (run if case.gamma is not None else run_functional)(case, own_backend)  # ahat, too
    assert_good(case, found, **own_rounding(own_backend, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("lengths", [False, True])
def test_module_is_within_its_budget(nonlinearity, lengths, dtype, backend, device):
    cell = f"rnn_{nonlinearity}"
    lists = {"torch": torch_native.KERNELS, "cuda": cuda.KERNELS_OF, "triton": triton.KERNELS_OF}
    if cell not in lists.get(backend, [cell]):
        pytest.skip(f"the backend has no kernel for {cell}")
    case = make_case(7, 5, 33, dtype=dtype, nonlinearity=nonlinearity, lengths=lengths)
    case = on(case, device)
    assert_good(case, run_module(case, backend), **rounding(backend, dtype))


@pytest.mark.parametrize("packed", [False, True])
def test_stack_equals_nn_rnn_on_the_cpu(packed, backend, exact, device):
    options = {"bidirectional": True, "batch_first": not packed, "dtype": exact}
    old, new = twins(backend, 3, 5, 2, **options)
    x, hx = torch.randn(6, 4, 3, dtype=exact), torch.randn(4, 6, 5, dtype=exact)
    there, hx = x.to(device), hx[:, :4] if packed else hx
    if packed:
        lengths = torch.tensor([3, 6, 1, 4])
        x, there = (pack_padded_sequence(v, lengths, enforce_sorted=False) for v in (x, there))
    found = results(new.to(device), there, hx.to(device))
    assert found["output"].device.type == device
    assert_same_results(found, results(old, x, hx))


def test_torch_backend_is_nn_rnn_to_the_bit(device):
    for nonlinearity in ("tanh", "relu"):
        old = nn.RNN(8, 16, 2, nonlinearity, bidirectional=True, device=device)
        new = rnnfast.RNN(
            8, 16, 2, nonlinearity, bidirectional=True, device=device, backend="torch"
        )
        new.load_state_dict(old.state_dict())
        x = torch.randn(7, 3, 8, device=device)
        wanted, found = results(old, x), results(new, x)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_runs_give_the_same_bits(dtype, backend, device):
    H = 129 if has_room(backend, 129, dtype, device) else 127
    rnn = rnnfast.RNN(65, H, 2, bidirectional=True, dtype=dtype, device=device, backend=backend)
    x = torch.randn(5, 33 if device == "cuda" else 9, 65, device=device, dtype=dtype)
    first, second = results(rnn, x), results(rnn, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["d weight_hh_l0"].isfinite().all()
