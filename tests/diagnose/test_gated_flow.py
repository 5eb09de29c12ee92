"""The gradient flow of cells with gates: closed forms of pinned gates, and what hooks on a plain
loop of the equations see."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from flows import inputs
from torch import Tensor, nn

import rnnfast
from rnnfast.gradient_flow import GradientFlow
from rnnfast.recurrence import record

KEEPS = {rnnfast.LSTM: 1, rnnfast.GRU: 1}  # the number of the gate that keeps the state: f, z
BOTH = pytest.mark.parametrize("make", list(KEEPS))
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
LENGTHS = pytest.mark.parametrize(
    ("backend", "T"),
    [
        ("cpu", 50),
        ("cpu", 200),
        ("reference", 50),
        pytest.param("reference", 200, marks=pytest.mark.proof),
    ],
)
IN, H, B = 3, 16, 4


def pinned(make: type, w: float, backend: str = "cpu", **options) -> nn.Module:
    """A module whose gate that keeps the state is w at every step. W_hh = 0, so nothing else comes
    back through time."""
    torch.manual_seed(0)
    rnn = make(IN, H, track_gradient_flow=True, backend=backend, **options)
    rows = slice(KEEPS[make] * H, (KEEPS[make] + 1) * H)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            if name.startswith("weight_hh"):
                p.zero_()
            elif name.startswith(("weight_ih", "bias_ih")):
                p[rows].zero_()
            else:
                p[rows].fill_(math.log(w / (1 - w)))
    return rnn


def flow_of(rnn: nn.Module, T: int, each: bool, **more) -> GradientFlow:
    """The record of a loss at the last step or, with ``each``, at every step."""
    dtype = next(rnn.parameters()).dtype
    y, _ = rnn(inputs(T, B, IN, dtype=dtype), **more)
    (y if each else y[-1]).float().square().sum().backward()
    return rnn.gradient_flow


@pytest.mark.parametrize("source", ["csrc/record.h", "triton_kernels/record.py"])
def test_kernels_write_every_field_in_the_order_of_the_record(source):
    text = (Path(__file__).parents[2] / source).read_text()
    if source.endswith(".h"):
        names = re.findall(r"^  k(\w+),$", text, re.MULTILINE)
        snake = tuple(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names)
        assert snake == record.FIELDS
    else:
        places = {int(place) for place in re.findall(r"p_step \+ (\d+)", text)}
        assert places == set(range(len(record.FIELDS)))


# -------------------------------------------------------------------------- with known answers


@BOTH
@LENGTHS
@pytest.mark.parametrize("each", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("w", [0.9, 0.99])
def test_half_life_of_a_pinned_gate(make, backend, T, each, w):
    flow = flow_of(pinned(make, w, backend), T, each)
    # Four roundings of float32 in a step: of the logit, the sigmoid and two products.
    bound = 4 * torch.finfo(torch.float32).eps / -math.log(w)
    assert flow.half_life.item() == pytest.approx(math.log(2) / -math.log(w), rel=bound)
    assert flow.gain.mean().item() == pytest.approx(w, rel=1e-6)


@BOTH
@LENGTHS
@pytest.mark.parametrize("each", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("w", [0.99, 0.999])
def test_half_life_of_a_pinned_gate_in_bfloat16(make, backend, T, each, w):
    """A gate of 0.999 is 1 in bfloat16. The logit is stored, so the half-life stays right."""
    flow = flow_of(pinned(make, w, backend, dtype=torch.bfloat16), T, each)
    assert flow.half_life.item() == pytest.approx(math.log(2) / -math.log(w), rel=0.02)


@BOTH
@BACKENDS
def test_horizon_and_verdict_of_a_pinned_gate(make, backend):
    """0.9^66 is the first power of 0.9 below 1/1000."""
    flow = flow_of(pinned(make, 0.9, backend), 100, True)
    assert flow.horizon.item() == 66
    verdict, name = flow.verdict, flow.cell.gain_name
    assert verdict.word == "vanishing"
    power = math.log10(0.9) * 99
    assert verdict.evidence == (
        f"gradient times 10^{power:.0f} over 100 steps (gates closed: mean {name} = 0.9)"
    )
    assert f"mean {name}" in str(flow)
    healthy = flow_of(pinned(make, 0.99, backend), 100, True)
    assert healthy.verdict.word == "healthy"
    assert healthy.horizon.item() == math.inf


@BOTH
@BACKENDS
def test_closed_gates_are_neither_dead_nor_saturated(make, backend):
    """With a gate of 0.001 the units of an RNN would be called dead or saturated."""
    flow = flow_of(pinned(make, 0.001, backend), 20, True)
    assert flow.verdict.word == "vanishing"
    assert f"gates closed: mean {flow.cell.gain_name} = 0.001" in flow.verdict.evidence


@BOTH
@BACKENDS
def test_gate_half_life_with_layers_directions_lengths_and_resets(make, backend):
    rnn = pinned(make, 0.9, backend, num_layers=2, bidirectional=True)
    reset = torch.zeros(50, B, dtype=torch.bool)
    reset[20] = True
    wanted = pytest.approx(math.log(2) / -math.log(0.9), rel=1e-5)
    flow = flow_of(rnn, 50, True, lengths=[50] * B, reset=reset)
    assert flow.half_life.flatten().tolist() == [wanted] * 4
    rnn.track_gradient_flow = "sample"
    flow = flow_of(rnn, 50, True, lengths=[50, 31, 2, 50], reset=reset)
    assert flow.half_life.flatten().tolist() == [wanted] * 4 * B


@BOTH
@BACKENDS
def test_a_window_ends_the_horizon_of_a_gate(make, backend):
    flow = flow_of(pinned(make, 0.99, backend, bptt_window=10), 35, True)
    assert flow.half_life.item() == pytest.approx(math.log(2) / -math.log(0.99), rel=1e-4)
    assert flow.horizon.item() == 5


@BACKENDS
def test_clipping_does_not_change_the_half_life_of_c(backend):
    """Clipping scales the gradient before the step; the factor is that of the step."""
    flow = flow_of(pinned(rnnfast.LSTM, 0.9, backend, clip_state_grad=1e-3), 50, True)
    assert (flow.clipped_norm < flow.state_norm).all()
    assert flow.half_life.item() == pytest.approx(math.log(2) / -math.log(0.9), rel=1e-4)


@BACKENDS
def test_the_joint_norm_would_mislead(backend):
    """The reason for the norms of c: with a loss at every step, dh_t hides the decay of c."""
    flow = flow_of(pinned(rnnfast.LSTM, 0.99, backend), 50, True)
    joint = (flow.carry_norm[..., :-1] / flow.clipped_norm[..., 1:]).log().mean().item()
    assert math.log(2) / -joint < 20
    assert flow.half_life.item() == pytest.approx(68.97, rel=1e-3)


# --------------------------------------------------------------------- beside hooks on the states


class ClipJoint(torch.autograd.Function):
    """Scales the gradients of all states of a sample together."""

    @staticmethod
    def forward(ctx, limit, *states):
        ctx.limit = limit
        return tuple(s.clone() for s in states)

    @staticmethod
    def backward(ctx, *grads):
        norm = torch.cat(grads).norm().item()
        scale = ctx.limit / norm if norm > ctx.limit else 1.0
        return None, *(scale * g for g in grads)


def lstm_step(p: Tensor, u: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (p + u).chunk(4)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def gru_step(p: Tensor, u: Tensor, states: list[Tensor]) -> list[Tensor]:
    (p_r, p_z, p_n), (u_r, u_z, u_n) = p.chunk(3), u.chunk(3)
    r, z = (p_r + u_r).sigmoid(), (p_z + u_z).sigmoid()
    n = (p_n + r * u_n).tanh()
    return [(1 - z) * n + z * states[0]]


STEPS = {rnnfast.LSTM: (lstm_step, 2), rnnfast.GRU: (gru_step, 1)}


def seen_by_hooks(rnn: nn.Module, x: Tensor, lengths: list[int], reset: Tensor, limit: float):
    """Norms [D, T, B] of the gradients that retain_grad sees, in a loop over samples and steps.
    The loss is 1/2 of the sum of squares of y, of c of all steps and of the last states."""
    step, n = STEPS[type(rnn)]
    T, batch, _ = x.shape
    names = "state_norm", "carry_norm", "cell_norm", "cell_carry_norm"
    found = {name: torch.zeros(2, T, batch, dtype=torch.float64) for name in names}
    weights, nodes, loss = dict(rnn.named_parameters()), [], 0.0
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        w_ih, w_hh, b_ih, b_hh = (
            weights[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        for b in range(batch):
            states = [torch.zeros(rnn.hidden_size, dtype=x.dtype) for _ in range(n)]
            for t in sorted(range(lengths[b]), reverse=d == 1):
                edge = t + d  # a reset cuts between the real steps edge - 1 and edge
                if edge < lengths[b] and reset[edge, b]:
                    states = [torch.zeros_like(s) for s in states]
                raw = step(w_ih @ x[t, b] + b_ih, w_hh @ states[0] + b_hh, states)
                whole = list(ClipJoint.apply(limit, *raw))
                states = [s.clone() for s in whole]  # what the step after sees
                for node in (*raw, *whole, *states):
                    node.retain_grad()
                nodes.append((d, t, b, raw, whole, states))
                loss = loss + sum(s.square().sum() for s in whole) / 2
            loss = loss + sum(s.square().sum() for s in whole) / 2
    loss.backward()

    def norm(parts: list[Tensor]) -> float:
        grads = [s.grad for s in parts if s.grad is not None]
        return torch.cat(grads).norm().item() if grads else 0.0

    for d, t, b, raw, whole, after in nodes:
        found["state_norm"][d, t, b] = norm(whole)
        found["carry_norm"][d, t, b] = norm(after)
        if n > 1:
            found["cell_norm"][d, t, b] = norm(raw[1:])
            found["cell_carry_norm"][d, t, b] = norm(after[1:])
    return found


@BOTH
@BACKENDS
@pytest.mark.parametrize("limit", [math.inf, 2.0], ids=["unclipped", "clipped"])
def test_norms_are_those_that_hooks_on_the_states_see(make, backend, limit):
    options = {"return_cell_states": True} if make is rnnfast.LSTM else {}
    torch.manual_seed(0)
    rnn = make(
        IN,
        H,
        bidirectional=True,
        dtype=torch.float64,
        track_gradient_flow="sample",
        clip_state_grad=limit if limit < math.inf else None,
        backend=backend,
        **options,
    )
    x, lengths = inputs(7, B, IN), [7, 5, 1, 7]
    reset = torch.zeros(7, B, dtype=torch.bool)
    reset[3, 0] = reset[4, 3] = reset[0, 1] = True
    y, last, *cells = rnn(x, lengths=lengths, reset=reset)
    last = last if isinstance(last, tuple) else (last,)
    sum(s.square().sum() / 2 for s in (y, *cells, *last)).backward()
    flow = rnn.gradient_flow
    wanted = seen_by_hooks(rnn, x, lengths, reset, limit)
    assert limit == math.inf or (wanted["state_norm"] > limit).any()
    for name, norms in wanted.items():
        torch.testing.assert_close(getattr(flow, name)[0], norms, rtol=1e-10, atol=1e-13)
    has_c = make is rnnfast.LSTM
    assert bool((flow.cell_norm[flow.entries > 0] > 0).all()) == has_c
    assert has_c or (flow.cell_norm == 0).all()
    assert has_c or (flow.cell_carry_norm == 0).all()
