"""What backward records, against a loop over single samples that PyTorch differentiates."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import time
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import modules, record
from rnnfast.backends import BACKENDS
from rnnfast.gradient_flow import GradientFlow

FIELDS = GradientFlow._fields
NORMS = FIELDS[:4]
T, B, IN, H = 6, 3, 3, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(backend: str, *sizes: int, **options) -> rnnfast.RNN:
    torch.manual_seed(0)
    options = {"track_gradient_flow": True, "dtype": torch.float64} | options
    return rnnfast.RNN(*(sizes or (IN, H)), backend=backend, **options)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (T, B, IN)), generator=generator, dtype=torch.float64).to(dtype)


def same(a, b) -> bool:
    """Bit for bit, NaN as NaN, for tensors and sequences of them."""
    if isinstance(a, Tensor):
        return (
            a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    return len(a) == len(b) and all(map(same, a, b))


def assert_close(found: GradientFlow, wanted: GradientFlow, tolerance: float) -> None:
    """Relative, every single value; what is 0 or not finite agrees exactly."""
    for name, a, w in zip(FIELDS, found, wanted, strict=True):
        assert a.dtype == torch.float64, name
        assert a.shape == w.shape, name
        assert torch.equal(a.isnan(), w.isnan()), f"{name}: {a} for {w}"
        usual = w.isfinite()
        assert torch.equal(a[~usual & ~w.isnan()], w[~usual & ~w.isnan()]), name
        wrong = (a[usual] - w[usual]).abs() > tolerance * w[usual].abs()
        assert not wrong.any(), f"{name}: {a[usual][wrong]} for {w[usual][wrong]}"


# ------------------------------------------------------------------------------------- the oracle

SLOPES = {
    "tanh": lambda n: 1 - n.tanh() ** 2,
    "relu": lambda n: (~(n <= 0)).to(n.dtype),  # as torch: NaN passes
    "sigmoid": lambda n: n.sigmoid() * (1 - n.sigmoid()),
}


class Step:
    """One step of one head of one sample: nodes of the graph whose gradients are looked at."""

    def __init__(self, rnn: rnnfast.RNN, p: Tensor, w: Tensor, before: Tensor, norm) -> None:
        self.a = p + w @ before
        n = self.a
        if norm is not None:
            mean, var = n.mean(), n.var(correction=0)
            n = norm[0] * (n - mean) / (var + rnn.norm_eps).sqrt() + norm[1]
        self.clipped = getattr(torch, rnn.nonlinearity)(n)
        self.h = self.clipped.clone()
        self.through = self.h.clone()  # what the step after sees
        if rnn.clip_state_grad is not None:
            self.clipped.register_hook(lambda g: clip(g, rnn.clip_state_grad))
        for node in (self.a, self.clipped, self.h, self.through):
            node.retain_grad()  # of a tensor with a hook: what the hook returns
        self.slope = SLOPES[rnn.nonlinearity](n.detach())


def clip(g: Tensor, limit: float) -> Tensor:
    norm = math.sqrt(sum(x * x for x in g.tolist()))
    return g * (limit / norm) if limit < norm < math.inf else g


def unrolled(rnn, x, hx, lengths, reset) -> tuple[Tensor, Tensor, dict]:
    """y, h_n and {(layer, direction, t, b): the steps of its heads}; x [T, B, I]."""
    T, B, _ = x.shape
    heads, S = rnn.num_heads, rnn.hidden_size // rnn.num_heads
    weights = dict(rnn.named_parameters())
    steps, h_n, u = {}, [], x
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(1 + rnn.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * d
            w_ih, w_hh, b_ih, b_hh = (
                weights[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            y = [[torch.zeros_like(b_ih)] * B for _ in range(T)]
            last = []
            for b in range(B):
                length = T if lengths is None else lengths[b]
                h = torch.zeros_like(b_ih) if hx is None else hx[len(h_n), b]
                through = h
                for t in reversed(range(length)) if d else range(length):
                    edge = t + d  # between real steps edge - 1 and edge
                    window = rnn.bptt_window or T
                    if 0 < edge < length and edge % window == 0:
                        through = through.detach()
                    if reset is not None and edge < length and reset[edge, b]:
                        through = torch.zeros_like(through)
                    p = w_ih @ u[t, b] + b_ih + b_hh
                    each = []
                    for k in range(heads):
                        own = slice(k * S, (k + 1) * S)
                        norm = None
                        if rnn.norm == "layer":
                            norm = [weights[f"norm_{x}{suffix}"][own] for x in ("weight", "bias")]
                        each.append(Step(rnn, p[own], w_hh[own], through[own], norm))
                    steps[layer, d, t, b] = each
                    h = y[t][b] = torch.cat([step.h for step in each])
                    through = torch.cat([step.through for step in each])
                last.append(h)
            h_n.append(torch.stack(last))
            outputs.append(torch.stack([torch.stack(row) for row in y]))
        u = torch.cat(outputs, -1)
    return u, torch.stack(h_n), steps


def gradients(steps: list[Step], name: str) -> Tensor:
    nodes = [getattr(step, name) for step in steps]
    return torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in nodes])


def measured(rnn: rnnfast.RNN, steps: dict, T: int, B: int) -> GradientFlow:
    """The table of what is recorded, from .grad of every step; per sample or of the batch."""
    shape = rnn.num_layers, 1 + rnn.bidirectional, T, B
    per_sample = rnn.track_gradient_flow == "sample"
    columns = [[b] for b in range(B)] if per_sample else [range(B)]
    fields = {name: torch.zeros(*shape[:3], len(columns), dtype=torch.float64) for name in FIELDS}
    for at in itertools.product(*map(range, shape[:3]), range(len(columns))):
        each = [s for b in columns[at[3]] for s in steps.get((*at[:3], b), ())]
        if not each:
            fields["gain"][at] = math.nan
            continue

        dh, carry, clipped, da = (gradients(each, n) for n in ("h", "through", "clipped", "a"))
        h = torch.cat([step.h for step in each])
        for name, value in zip(NORMS, (dh, carry, clipped, da)):
            fields[name][at] = value.double().square().sum().sqrt()
        fields["state_max"][at] = dh.abs().max()
        fields["gain"][at] = torch.cat([step.slope for step in each]).abs().mean()
        fields["nonfinite_grad"][at] = (~(dh.isfinite() & da.isfinite())).sum()
        fields["nonfinite_state"][at] = (~h.isfinite()).sum()
    return GradientFlow(*(x if per_sample else x.squeeze(-1) for x in fields.values()))


def compare(rnn, x, hx=None, lengths=None, reset=None, grad_y=None, grad_h_n=None, tolerance=0.0):
    """Runs the module and the loop (in float64); the record, which agrees."""
    oracle = copy.deepcopy(rnn).double()
    wide = [v if v is None else v.double() for v in (x, hx, grad_y, grad_h_n)]
    with torch.enable_grad():
        y, h_n, steps = unrolled(oracle, wide[0], wide[1], lengths, reset)
        backward(y, h_n, *wide[2:])
    y, h_n = rnn(x, hx, lengths=lengths, reset=reset)
    backward(y, h_n, grad_y, grad_h_n)
    wanted = measured(oracle, steps, *x.shape[:2])
    assert_close(rnn.gradient_flow, wanted, tolerance or TOLERANCE[x.dtype])
    return rnn.gradient_flow


def backward(y: Tensor, h_n: Tensor, grad_y: Tensor | None, grad_h_n: Tensor | None) -> None:
    pairs = [(v, g) for v, g in ((y, grad_y), (h_n, grad_h_n)) if g is not None]
    torch.autograd.backward(*zip(*pairs))


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
CASES = random.Random(0).sample(list(itertools.product(*CHOICES.values())), 40)


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
    assert ((flow.clipped_norm - limit).abs() <= 1e-12 * limit).all()
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
    """Factors are powers of two: the norms have no rounding at all, down to 2^-149, up to 2^127.
    Their squares, in float32, are 0 from 2^-75 and infinite from 2^64."""
    steps = 149 // 4 + 1 if exponent < 0 else 127 // 3 + 1
    wanted = [2 * 2.0 ** (exponent * lag) for lag in reversed(range(steps))]
    assert powers(own_backend, exponent, steps).tolist() == wanted


def test_norms_are_zero_where_float32_is(own_backend):
    """One step after the smallest number there is."""
    found = powers(own_backend, -4, 149 // 4 + 2).tolist()
    assert found[:2] == [0, 2 * 2.0**-148]


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
    wanted = torch.zeros(T, B, dtype=torch.float64)
    wanted[3:, 1] = H
    assert torch.equal(flow.nonfinite_state[0, 0], wanted)
    wanted[:, 1] = H  # the gradient takes it back to the first step
    assert torch.equal(flow.nonfinite_grad[0, 0], wanted)
    for name in (*NORMS[:2], "state_max"):  # at T - 1 dh is 1, and da alone NaN
        found = getattr(flow, name)[0, 0].isnan()
        assert found[: T - 1, 1].all(), name
        assert found.sum() == T - 1, name


def test_one_nan_entry_makes_state_max_nan(own_backend):
    rnn, grad = make(own_backend), torch.ones(T, B, H, dtype=torch.float64)
    grad[T - 1, 1, 5] = math.nan
    rnn(inputs())[0].backward(grad)
    assert rnn.gradient_flow.state_max[0, 0, T - 1].isnan()
    assert rnn.gradient_flow.nonfinite_grad[0, 0].tolist() == [H] * (T - 1) + [1]
    grad[T - 1, 1, 5] = -math.inf
    rnn(inputs())[0].backward(grad)
    assert rnn.gradient_flow.state_max[0, 0, T - 1] == math.inf
    assert rnn.gradient_flow.state_norm[0, 0, T - 1] == math.inf


# --------------------------------------------------------------------------- which pass it is of


def run(rnn: rnnfast.RNN, x: Tensor | None = None, call=None) -> GradientFlow:
    y, h_n = (call or rnn)(inputs() if x is None else x)
    (y.square().sum() + h_n.sum()).backward()
    return rnn.gradient_flow


def gradients_of(rnn: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in rnn.parameters()]


def test_reading_what_is_not_there_raises(own_backend):
    rnn = make(own_backend, track_gradient_flow=False)
    with pytest.raises(RuntimeError, match="this RNN does not record it"):
        _ = rnn.gradient_flow
    rnn = make(own_backend)
    for forward in (lambda: None, lambda: rnn(inputs())):
        forward()
        with pytest.raises(RuntimeError, match="no backward pass has come through"):
            _ = rnn.gradient_flow


def test_tracking_may_begin_later(own_backend):
    rnn = make(own_backend, track_gradient_flow=False, num_layers=2)
    rnn.track_gradient_flow = True
    with pytest.raises(RuntimeError, match="no backward pass has come through"):
        _ = rnn.gradient_flow
    assert same(run(rnn), run(make(own_backend, num_layers=2)))


def test_a_retained_graph_gives_the_same_bits(own_backend):
    rnn = make(own_backend, num_layers=2, norm="layer", clip_state_grad=0.5)
    loss = rnn(inputs())[0].square().sum()
    loss.backward(retain_graph=True)
    grads, flow = gradients_of(rnn), rnn.gradient_flow
    rnn.zero_grad()
    run(rnn, 2 * inputs())  # the record of another pass
    assert not same(rnn.gradient_flow, flow)
    rnn.zero_grad()
    loss.backward()
    assert same(gradients_of(rnn), grads)
    assert same(rnn.gradient_flow, flow)


def test_the_record_does_not_change_the_gradients(own_backend):
    options = {"num_layers": 2, "bidirectional": True}
    found = []
    for tracking in (True, "sample"):
        rnn = make(own_backend, track_gradient_flow=tracking, **options)
        run(rnn)
        found.append(gradients_of(rnn))
    assert same(*found)
    plain = make(own_backend, track_gradient_flow=False, **options)
    y, h_n = plain(inputs())
    (y.square().sum() + h_n.sum()).backward()
    for a, w in zip(found[0], gradients_of(plain), strict=True):
        assert (a - w).abs().max() <= 1e-12 * w.abs().max()


def test_it_does_not_depend_on_which_gradients_are_wanted(own_backend):
    rnn = make(own_backend)
    wanted = run(rnn)
    assert same(run(rnn, inputs().requires_grad_()), wanted)
    rnn.requires_grad_(False)
    assert same(run(rnn, inputs().requires_grad_()), wanted)


def test_create_graph_records_as_well(own_backend):
    rnn = make(own_backend, num_layers=2, norm="layer", clip_state_grad=0.5)
    wanted = run(rnn)
    rnn._records = rnn._new_records()
    y, h_n = rnn(inputs())
    loss = y.square().sum() + h_n.sum()
    torch.autograd.grad(loss, list(rnn.parameters()), create_graph=True)
    assert_close(rnn.gradient_flow, wanted, 1e-12)


def test_layers_without_a_gradient_are_nan(own_backend):
    """Of the last pass, whatever an earlier one left there."""
    rnn = make(own_backend, num_layers=2, bidirectional=True)
    x = inputs()[:4]
    whole = run(rnn, x)
    assert all(v.isfinite().all() for v in whole)
    run(rnn)  # of another T
    y, h_n = rnn(x)
    torch.autograd.grad(y.square().sum() + h_n.sum(), rnn.weight_hh_l1)
    for name, found, wanted in zip(FIELDS, rnn.gradient_flow, whole):
        assert found.shape == (2, 2, 4), name
        assert found[0].isnan().all(), name
        assert torch.equal(found[1], wanted[1]), name
    assert same(run(rnn, x), whole)


def test_a_pass_that_does_not_come_through_leaves_the_record(own_backend):
    first, second = make(own_backend), make(own_backend, H, H)
    before = run(first)
    y, _ = first(2 * inputs())
    torch.autograd.grad(second(y)[0].sum(), y)
    assert same(first.gradient_flow, before)
    assert (second.gradient_flow.state_norm > 0).all()


def test_two_modules_have_records_of_their_own(own_backend):
    model = nn.ModuleList([make(own_backend), make(own_backend, H, 5, num_layers=2)])
    y, _ = model[0](inputs())
    y.retain_grad()
    z, _ = model[1](y)
    z.square().sum().backward()
    assert model[0].gradient_flow.state_norm.shape == (1, 1, T)
    assert model[1].gradient_flow.state_norm.shape == (2, 1, T)
    after = model[0].gradient_flow
    alone = make(own_backend)
    alone(inputs())[0].backward(y.grad)
    assert same(after, alone.gradient_flow)


def test_forward_alone_does_not_touch_it(own_backend):
    rnn = make(own_backend)
    wanted = run(rnn)
    with torch.no_grad():
        rnn(2 * inputs())
    with torch.inference_mode():
        rnn(3 * inputs())
    rnn.eval()(4 * inputs())
    rnn.train()(5 * inputs())
    rnn(inputs(2 * modules.ROOM, 1, IN))
    assert same(rnn.gradient_flow, wanted)


def test_what_was_read_stays(own_backend):
    rnn = make(own_backend)
    flow = run(rnn)
    kept = copy.deepcopy(flow)
    run(rnn, 2 * inputs())
    assert same(flow, kept)


def test_accumulated_gradients(own_backend):
    """The record is of the second pass alone."""
    rnn = make(own_backend)
    run(rnn)
    first = gradients_of(rnn)
    flow = run(rnn, 2 * inputs())
    both = gradients_of(rnn)
    alone = make(own_backend)
    assert same(flow, run(alone, 2 * inputs()))
    for a, b, c in zip(first, gradients_of(alone), both, strict=True):
        assert torch.equal(a + b, c)


@pytest.mark.parametrize("room", [2, modules.ROOM])
@pytest.mark.parametrize(("T_first", "T_second"), [(4, 4), (4, 6), (6, 4)])
def test_twice_in_one_loss(T_first, T_second, room, own_backend, monkeypatch):
    """Autograd goes back through the second call first: the first one's is the last."""
    monkeypatch.setattr(modules, "ROOM", room)
    x = inputs()
    wanted = run(make(own_backend), x[:T_first])
    rnn = make(own_backend)
    results = rnn(x[:T_first]), rnn(3 * x[:T_second])
    sum(y.square().sum() + h_n.sum() for y, h_n in results).backward()
    assert same(rnn.gradient_flow, wanted)


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_more_and_fewer_steps_than_there_is_room_for(tracking, own_backend, monkeypatch):
    wanted = [
        run(make(own_backend, track_gradient_flow=tracking, num_layers=2), inputs(steps, B, IN))
        for steps in (3, 6, 7, 40, 2)
    ]
    monkeypatch.setattr(modules, "ROOM", 4)
    rnn = make(own_backend, track_gradient_flow=tracking, num_layers=2)
    for flow in wanted:
        assert same(run(rnn, inputs(flow.state_norm.shape[2], B, IN)), flow)


def test_a_pass_that_began_before_there_was_more_room(own_backend, monkeypatch):
    monkeypatch.setattr(modules, "ROOM", 4)
    rnn = make(own_backend)
    wanted = run(rnn, inputs()[:3])
    y, h_n = rnn(inputs()[:3])
    run(rnn, inputs(20, B, IN))
    (y.square().sum() + h_n.sum()).backward()
    assert same(rnn.gradient_flow, wanted)


def test_the_record_keeps_its_address(own_backend):
    """While there is room, as CUDA graphs need."""
    rnn = make(own_backend, num_layers=2)
    before = [made[-1].data_ptr() for made in rnn._records]
    for steps in (6, 3, 50):
        run(rnn, inputs(steps, B, IN))
    assert [made[-1].data_ptr() for made in rnn._records] == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, own_backend):
    rnn = make(own_backend, num_layers=2)
    x = inputs().requires_grad_()
    wanted = run(rnn, x)
    rnn._records = rnn._new_records()
    found = run(rnn, x, lambda x: checkpoint(rnn, x, use_reentrant=reentrant))
    assert same(found, wanted)


# ------------------------------------------------------------------------------ shapes of inputs


def test_unbatched_and_batch_first(own_backend):
    wanted = run(make(own_backend))
    x = inputs().transpose(0, 1)
    assert_close(run(make(own_backend, batch_first=True), x), wanted, 1e-12)
    one = run(make(own_backend), inputs()[:, :1])
    assert_close(run(make(own_backend), inputs()[:, 0]), one, 1e-12)


@pytest.mark.parametrize("tracking", [True, "sample"])
def test_packed_sequences_in_the_order_of_the_samples(tracking, own_backend):
    rnn = make(own_backend, bidirectional=True, track_gradient_flow=tracking)
    lengths, x = [2, 6, 3], inputs()
    grad = inputs(2, B, H, seed=4)
    packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)], enforce_sorted=False)
    y, h_n = rnn(packed)
    (h_n * grad).sum().add(y.data.square().sum()).backward()
    found = rnn.gradient_flow
    y, h_n = rnn(x, lengths=lengths)
    (h_n * grad).sum().add(y.square().sum()).backward()
    assert_close(found, rnn.gradient_flow, 1e-12)
    if tracking == "sample":
        there = (found.state_norm[0, 0] > 0).sum(0)
        assert there.tolist() == lengths


def test_samples_add_up_to_the_batch(own_backend):
    """Norms in squares, counts as they are, the largest as the largest."""
    options = {"bidirectional": True, "num_heads": 2, "clip_state_grad": 0.5}
    whole = run(make(own_backend, **options))
    each = run(make(own_backend, track_gradient_flow="sample", **options))
    together = [v.square().sum(-1).sqrt() for v in each[:4]]
    together += [each.state_max.amax(-1), each.gain.mean(-1)]
    together += [each.nonfinite_grad.sum(-1), each.nonfinite_state.sum(-1)]
    assert_close(whole, GradientFlow(*together), 1e-12)


# ------------------------------------------------------------------------------- the surroundings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_module_goes_on(dtype, own_backend):
    """Its record is no number of the module: no cast turns it into another."""
    rnn = make(own_backend, dtype=torch.float32)
    before = run(rnn, inputs(dtype=torch.float32))
    rnn.to(dtype)
    assert same(rnn.gradient_flow, before)
    rnn.zero_grad()
    found = run(rnn, inputs(dtype=dtype))
    fresh = make(own_backend, dtype=torch.float32).to(dtype)
    assert same(found, run(fresh, inputs(dtype=dtype)))
    assert found.state_norm.dtype == torch.float64
    assert (found.state_norm > 0).all()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_a_record_of_its_own(way, own_backend):
    rnn = make(own_backend, num_layers=2)
    before = run(rnn)
    twin = copy.deepcopy(rnn) if way == "deepcopy" else pickle.loads(pickle.dumps(rnn))
    with pytest.raises(RuntimeError, match="no backward pass has come through"):
        _ = twin.gradient_flow
    run(twin, 2 * inputs())
    assert same(rnn.gradient_flow, before)
    assert not same(twin.gradient_flow, before)
    assert same(run(twin), before)


def test_nothing_of_it_is_saved(own_backend):
    rnn, plain = make(own_backend), make(own_backend, track_gradient_flow=False)
    run(rnn)
    assert rnn.state_dict().keys() == plain.state_dict().keys()
    assert not list(rnn.buffers())
    rnn.load_state_dict(plain.state_dict())
    plain.load_state_dict(rnn.state_dict())
    rnn.zero_grad()
    assert len(pickle.dumps(rnn)) < 8 * record.numbers(1, modules.ROOM, 1)


def test_autocast_records_as_a_module_in_that_dtype(own_backend):
    rnn = make(own_backend, dtype=torch.float32, num_layers=2)
    x, grad = inputs(dtype=torch.float32), inputs(T, B, H, dtype=torch.bfloat16, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = rnn(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad)
    narrow = copy.deepcopy(rnn).bfloat16()
    narrow(x.bfloat16())[0].backward(grad)
    assert same(rnn.gradient_flow, narrow.gradient_flow)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_grad_scaler(limit, own_backend):
    """The record is of the scaled loss; so is what clip_state_grad compares with. A power of two
    leaves all bits."""
    scale, x = 2.0**10, inputs(dtype=torch.float32)
    rnn = make(own_backend, dtype=torch.float32, clip_state_grad=limit)
    # In the unscaled pass the limit that has the same effect.
    plain = make(own_backend, dtype=torch.float32, clip_state_grad=limit and limit / scale)
    plain(x)[0].square().sum().backward()
    wanted = plain.gradient_flow
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    scaler.scale(rnn(x)[0].square().sum()).backward()
    scaler.unscale_(optimizer)
    assert same(gradients_of(rnn), gradients_of(plain))
    flow = rnn.gradient_flow
    for name in (*NORMS, "state_max"):
        assert torch.equal(getattr(flow, name), scale * getattr(wanted, name)), name
    for name in ("gain", "nonfinite_grad", "nonfinite_state"):
        assert torch.equal(getattr(flow, name), getattr(wanted, name)), name
    if limit:
        assert (flow.clipped_norm < flow.state_norm).any()
        assert (flow.clipped_norm <= math.sqrt(B) * limit * (1 + 1e-5)).all()


LENGTHS = [6, 6, 4, 4]  # the first two samples on one rank, the others on the second
PATIENCE = 120  # seconds


def shard(rank: int) -> Tensor:
    return inputs(6, 4, IN)[: LENGTHS[2 * rank], 2 * rank : 2 * rank + 2]


def train_on_a_rank(rank: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    rnn = make(backend, num_layers=2, bidirectional=True)
    run(rnn, shard(rank), nn.parallel.DistributedDataParallel(rnn))
    torch.save((gradients_of(rnn), tuple(rnn.gradient_flow)), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(own_backend, tmp_path):
    """Gradients are those of the whole batch; each rank has the record of its own part, whose T
    differs."""
    arguments = own_backend, str(tmp_path)
    ranks = torch.multiprocessing.spawn(train_on_a_rank, arguments, nprocs=2, join=False)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for one another"
    finally:
        for process in ranks.processes:
            process.kill()
    rnn = make(own_backend, num_layers=2, bidirectional=True)
    y, h_n = rnn(inputs(6, 4, IN), lengths=LENGTHS)
    ((y.square().sum() + h_n.sum()) / 2).backward()
    for rank in range(2):
        grads, flow = torch.load(tmp_path / str(rank))
        for a, w in zip(grads, gradients_of(rnn), strict=True):
            assert (a - w).abs().max() <= 1e-12 * w.abs().max()
        alone = make(own_backend, num_layers=2, bidirectional=True)
        assert_close(GradientFlow(*flow), run(alone, shard(rank)), 1e-12)


# --------------------------------------------------------------------------------- when it is off


@pytest.mark.parametrize("tracking", [False, True])
def test_when_it_is_off_there_is_nothing_of_it(tracking, own_backend, monkeypatch):
    """No buffer, and no backend is asked to fill one."""
    backend, records = BACKENDS[own_backend], []
    backward = backend.backward

    def watched(*args, **more):
        records.append(args[12])
        return backward(*args, **more)

    monkeypatch.setattr(backend, "backward", watched)
    rnn = make(own_backend, num_layers=2, track_gradient_flow=tracking)
    y, h_n = rnn(inputs())
    (y.square().sum() + h_n.sum()).backward()
    assert len(rnn._records) == (2 if tracking else 0)
    if tracking:
        assert [r.shape for r in records] == [(1, T, 1, len(record.FIELDS))] * 2
    elif own_backend == "reference":
        assert records == []  # PyTorch itself differentiates it
    else:
        assert records == [None, None]


def test_without_gradients_there_is_nothing_of_it(own_backend, monkeypatch):
    monkeypatch.setattr(modules, "ROOM", 1)
    rnn = make(own_backend)
    before = rnn._records[0][-1]
    with torch.no_grad():
        rnn(inputs())
    assert [made[-1] is before for made in rnn._records] == [True]
    assert len(rnn._records[0]) == 1


def test_what_lists_all_attributes_does_not_stumble_over_it(own_backend):
    """As torch.jit.trace does."""
    rnn = rnnfast.RNN(2, 3, backend=own_backend, track_gradient_flow=True)
    for module in (rnnfast.RNN(2, 3), rnn):
        assert "gradient_flow" not in dir(module)
        assert all(hasattr(module, name) for name in dir(module))
    rnn(torch.randn(4, 1, 2))[0].sum().backward()
    assert "gradient_flow" in dir(rnn)
