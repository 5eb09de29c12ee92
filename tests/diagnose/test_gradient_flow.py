"""The record of backward, against a loop over single samples that PyTorch differentiates."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from flows import (
    IN,
    NORMS,
    TOLERANCE,
    B,
    H,
    T,
    compare,
    inputs,
    make,
)
from torch import Tensor
from twins import EXACT

CHOICES = {
    "nonlinearity": ["tanh", "relu", "sigmoid"],
    "num_layers": [1, 2],
    "bidirectional": [False, True],
    "num_heads": [1, 2],
    "norm": [None, "layer"],
    "bptt_window": [None, 2],
    "clip_state_grad": [None, 0.5],
    "track_gradient_flow": [True, "sample"],
    "lengths": [None, [6, 0, 3]],
    "reset": [False, True],
    "hx": [False, True],
    "loss on": ["y", "h_n", "both"],
}
NUMBER = 40 if torch.float64 == EXACT else 15  # a case takes two seconds in Triton's interpreter
CASES = random.Random(0).sample(list(itertools.product(*CHOICES.values())), NUMBER)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_field_against_an_unrolled_loop(case, dtype, own_backend):
    options = dict(zip(CHOICES, CASES[case]))
    lengths, with_reset, with_hx, on = (options.pop(k) for k in list(CHOICES)[-4:])
    rnn = make(own_backend, dtype=dtype, **options)
    states = rnn.num_layers * (1 + rnn.bidirectional)
    compare(
        rnn,
        inputs(dtype=dtype),
        inputs(states, B, H, dtype=dtype, seed=2) if with_hx else None,
        lengths,
        torch.arange(T * B).view(T, B) % 4 == 1 if with_reset else None,
        inputs(T, B, H * (1 + rnn.bidirectional), dtype=dtype, seed=3) if on != "h_n" else None,
        inputs(states, B, H, dtype=dtype, seed=4) if on != "y" else None,
    )


def test_the_cases_have_every_choice():
    for values, chosen in zip(CHOICES.values(), zip(*CASES), strict=True):
        assert all(value in chosen for value in values)


def test_the_gradient_of_h_n_is_no_carry(own_backend):
    """With a loss on h_n alone all of dh at the last step comes from outside."""
    rnn = make(own_backend, bidirectional=True)
    rnn(inputs())[1].sum().backward()
    flow = rnn.gradient_flow
    for d, (last, inner) in enumerate([(T - 1, slice(T - 1)), (0, slice(1, T))]):
        assert flow.carry_norm[0, d, last] == 0
        assert flow.state_norm[0, d, last] == math.sqrt(B * H)
        assert torch.equal(flow.carry_norm[0, d, inner], flow.state_norm[0, d, inner])
        assert (flow.carry_norm[0, d, inner] > 0).all()


def test_clipping_shows_between_two_fields(own_backend):
    rnn = make(own_backend, track_gradient_flow="sample", clip_state_grad=0.25, num_heads=2)
    rnn(inputs())[0].sum().backward()  # dh of a head is far above the limit
    flow = rnn.gradient_flow
    assert (flow.state_norm > 1).all()
    limit = torch.tensor(0.25 * math.sqrt(2), dtype=torch.float64)
    assert ((flow.clipped_norm - limit).abs() <= TOLERANCE[EXACT] * limit).all()
    rnn.clip_state_grad = None
    rnn(inputs())[0].sum().backward()
    assert torch.equal(rnn.gradient_flow.clipped_norm, rnn.gradient_flow.state_norm)


# ------------------------------------------------------------------------------- small and large


def powers(backend: str, exponent: int, T: int) -> Tensor:
    """state_norm of h_t = 2^exponent h_{t-1} + 1 under the loss h_T."""
    rnn = make(backend, 1, 4, nonlinearity="relu", dtype=torch.float32)
    with torch.no_grad():
        rnn.weight_ih_l0.zero_()
        rnn.weight_hh_l0.copy_(torch.eye(4) * 2.0**exponent)
        rnn.bias_ih_l0.fill_(1)
        rnn.bias_hh_l0.zero_()
    rnn(torch.zeros(T, 1, 1))[1].sum().backward()
    flow = rnn.gradient_flow
    for same_here in (flow.clipped_norm, flow.preact_norm, 2 * flow.state_max):
        assert torch.equal(same_here, flow.state_norm)
    return flow.state_norm[0, 0]


@pytest.mark.parametrize("exponent", [-4, 3])
def test_norms_over_the_range_of_float32(exponent, own_backend):
    """Factors are powers of two: the norms have no rounding at all, down to the least number, up to
    2^127. Their squares, in float32, are 0 from 2^-75 and infinite from 2^64."""
    steps = least(own_backend) // 4 + 1 if exponent < 0 else 127 // 3 + 1
    wanted = [2 * 2.0 ** (exponent * lag) for lag in reversed(range(steps))]
    assert powers(own_backend, exponent, steps).tolist() == wanted


def test_norms_are_zero_where_float32_is(own_backend):
    """One step after the smallest number there is."""
    lag = least(own_backend) // 4
    found = powers(own_backend, -4, lag + 2).tolist()
    assert found[:2] == [0, 2 * 2.0 ** (-4 * lag)]


def least(backend: str) -> int:
    """-log2 of the least number: the CPU's kernels take subnormal ones for zero in backward; those
    of CUDA multiply parts in bfloat16, of which 2^-133 is the last, and still have its product."""
    return {"cpu": 126, "cuda": 137}.get(backend, 149)


def test_norms_down_to_1e_30(own_backend):
    """An orthogonal W_hh / 10 over 31 steps: each step divides by ten, and every norm is right."""
    rnn = make(own_backend, init="orthogonal", nonlinearity="relu", dtype=torch.float32)
    with torch.no_grad():
        rnn.weight_hh_l0 *= 0.1
        rnn.weight_ih_l0.zero_()
        rnn.bias_ih_l0.fill_(1)  # more than W_hh can take away: no unit is ever idle
    steps = 32
    x, grad = inputs(steps, 2, IN, dtype=torch.float32), inputs(1, 2, H, dtype=torch.float32)
    flow = compare(rnn, x, grad_h_n=grad)
    assert 1e-31 < flow.state_norm[0, 0, 0] < 1e-30


# ----------------------------------------------------------------------------------- not finite

PLANTED = ["x", "weight_hh", "grad_y", "grad_h_n"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", PLANTED)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("clip_state_grad", [None, 0.5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_not_finite_as_in_the_loop(
    value, where, nonlinearity, clip_state_grad, bidirectional, own_backend
):
    rnn = make(
        own_backend,
        track_gradient_flow="sample",
        nonlinearity=nonlinearity,
        clip_state_grad=clip_state_grad,
        bidirectional=bidirectional,
    )
    D = 1 + bidirectional
    x, grad_y, grad_h_n = inputs(), inputs(T, B, D * H, seed=3), inputs(D, B, H, seed=4)
    planted = {"x": x, "grad_y": grad_y, "grad_h_n": grad_h_n}
    if where == "weight_hh":
        with torch.no_grad():
            rnn.weight_hh_l0[2, 1] = value
    else:
        planted[where][D - 1, 1, 2] = value
    flow = compare(rnn, x, grad_y=grad_y, grad_h_n=grad_h_n)
    if where.startswith("grad"):
        assert flow.nonfinite_state.sum() == 0
    if (where, value, nonlinearity) != ("x", math.inf, "tanh"):  # which makes 1 and -1 of it
        assert flow.nonfinite_grad.sum() + flow.nonfinite_state.sum() > 0
    if where != "weight_hh":
        assert flow.nonfinite_grad[..., [0, 2]].sum() == 0


def test_nan_in_x_is_seen_from_its_step_on(own_backend):
    rnn, x = make(own_backend, track_gradient_flow="sample"), inputs()
    x[3, 1, 0] = math.nan
    rnn(x)[0].sum().backward()
    flow = rnn.gradient_flow
    wanted = torch.zeros(T, B, dtype=EXACT)
    wanted[3:, 1] = H
    assert torch.equal(flow.nonfinite_state[0, 0], wanted)
    wanted[:, 1] = H  # the gradient takes it back to the first step
    assert torch.equal(flow.nonfinite_grad[0, 0], wanted)
    for name in (*NORMS[:2], "state_max"):  # at T - 1 dh is 1, and da alone NaN
        found = getattr(flow, name)[0, 0].isnan()
        assert found[: T - 1, 1].all(), name
        assert found.sum() == T - 1, name


def test_one_nan_entry_makes_state_max_nan(own_backend):
    rnn, grad = make(own_backend), torch.ones(T, B, H, dtype=EXACT)
    grad[T - 1, 1, 5] = math.nan
    rnn(inputs())[0].backward(grad)
    assert rnn.gradient_flow.state_max[0, 0, T - 1].isnan()
    assert rnn.gradient_flow.nonfinite_grad[0, 0].tolist() == [H] * (T - 1) + [1]
    grad[T - 1, 1, 5] = -math.inf
    rnn(inputs())[0].backward(grad)
    assert rnn.gradient_flow.state_max[0, 0, T - 1] == math.inf
    assert rnn.gradient_flow.state_norm[0, 0, T - 1] == math.inf
