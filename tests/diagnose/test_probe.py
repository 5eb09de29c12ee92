"""rnnfast.probe, on recurrences whose answer is known."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from cases import FLOATS
from flows import IN, TOLERANCE, B, H, T, inputs, make, same, unrolled
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast.diagnose.probe import _unit_vectors
from rnnfast.gradient_flow import GradientFlow

pytestmark = pytest.mark.usefixtures("one_torch_thread")
UNITS = 4


def linear(backend: str, w: float, dtype: torch.dtype = torch.float64, **options) -> rnnfast.RNN:
    """h_t = w h_{t-1} + x_t + 1, each unit for itself, in ReLU above 0."""
    rnn = make(backend, 1, UNITS, nonlinearity="relu", dtype=dtype, **options)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            weight.fill_(name.startswith("bias_ih"))
            if name.startswith("weight_hh"):
                weight.copy_(w * torch.eye(UNITS, dtype=torch.float64))
        rnn.weight_ih_l0.fill_(1)
    return rnn


# ---------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("w", [0.5, 0.9, 0.99])
def test_powers_of_a_scalar(w, dtype, own_backend):
    steps = 700  # 0.99^688 is 1/1000
    found = rnnfast.probe(linear(own_backend, w, dtype), torch.zeros(steps, 3, 1, dtype=dtype))
    w = torch.tensor(w, dtype=dtype).item()
    lags = torch.arange(steps, dtype=torch.float64)
    wanted = w**lags
    inside = wanted >= 1e-30
    error = (found.norm[0, 0] - wanted).abs()[inside]
    eps = torch.finfo(dtype).eps
    assert (error <= ((lags + 2) * eps * wanted)[inside]).all()  # a rounding at each step
    assert torch.equal(found.out_of_range[0, 0], ~inside)
    growth = found.log_growth[0, 0]
    assert growth[0].isnan()
    assert growth[~inside].isnan().all()
    assert ((growth[1:] - math.log(w)).abs()[inside[1:]] <= 4 * eps).all()
    assert found.half_life[0, 0].item() == pytest.approx(math.log(2) / -math.log(w), rel=0.02)
    assert found.horizon[0, 0] == math.ceil(math.log(1e-3) / math.log(w))
    assert found.verdict.word == "vanishing"
    assert f"{found.horizon[0, 0]:.0f} steps later a thousand times less" in found.summary


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("w", "word"), [(1.0, "healthy"), (1.1, "exploding")])
def test_what_stays_and_what_grows(w, word, dtype, own_backend):
    steps = 100
    found = rnnfast.probe(linear(own_backend, w, dtype), torch.zeros(steps, 3, 1, dtype=dtype))
    eps = torch.finfo(dtype).eps
    assert found.lyapunov[0, 0].item() == pytest.approx(math.log(w), abs=2 * eps)
    assert found.norm[0, 0, -1].item() == pytest.approx(w ** (steps - 1), rel=steps * eps)
    assert found.half_life[0, 0] == found.horizon[0, 0] == math.inf
    assert found.verdict.word == word
    if word == "healthy":
        assert torch.equal(found.norm[0, 0], found.norm[0, 0, :1].expand(steps))
        assert found.advice == ()
    else:
        assert "clip_state_grad=1.0" in found.advice


def householder(n: int) -> Tensor:
    """Orthogonal; it leaves (1, ..., 1) as it is."""
    v = inputs(n)
    v -= v.mean()
    return torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_orthogonal_is_flat(nonlinearity, own_backend):
    rnn = make(own_backend, init="orthogonal", nonlinearity=nonlinearity, dtype=torch.float32)
    x = inputs(100, 4, IN, dtype=torch.float32)
    with torch.no_grad():
        if nonlinearity == "relu":
            rnn.weight_ih_l0.zero_()
            rnn.bias_ih_l0.fill_(1)  # h_t = t
            rnn.bias_hh_l0.zero_()
            rnn.weight_hh_l0.copy_(householder(H))
        else:
            x *= 1e-4  # where tanh is the identity
    found = rnnfast.probe(rnn, x)
    assert ((found.norm - 1).abs() < 0.01).all()
    assert found.verdict.word == "healthy"


CASES = {
    "one layer": {},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "lengths": {"num_layers": 2, "bidirectional": True, "lengths": [6, 0, 3]},
    "reset": {"num_layers": 2, "bidirectional": True, "reset": True},
    "both": {"bidirectional": True, "lengths": [6, 5, 3], "reset": True, "hx": True},
    "heads": {"num_heads": 2, "lengths": [6, 2, 3]},
    "layer norm": {"num_layers": 2, "norm": "layer", "num_heads": 2, "bidirectional": True},
    "relu": {"nonlinearity": "relu", "num_layers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_every_sample_against_the_jacobian(case, own_backend):
    """v^T dh_end/dh_t of each sample, by PyTorch from an unrolled loop."""
    options = dict(CASES[case])
    lengths, with_reset, with_hx = (options.pop(k, None) for k in ("lengths", "reset", "hx"))
    rnn = make(own_backend, **options)
    L, D = rnn.num_layers, 1 + rnn.bidirectional
    x = inputs()
    reset = torch.arange(T * B).view(T, B) % 8 == 5 if with_reset else None
    hx = inputs(L * D, B, H, seed=2) if with_hx else None
    found = rnnfast.probe(rnn, x, hx, lengths=lengths, reset=reset, seed=3)
    _, h_n, steps = unrolled(rnn, x, hx, lengths, reset)
    vectors = _unit_vectors(h_n, D, 3)
    lengths = lengths or [T] * B
    squares = torch.zeros(L, D, T, B, dtype=torch.float64)  # by lag
    factors = torch.full((L, D, T, B), math.nan, dtype=torch.float64)
    there = torch.zeros(D, T, B, dtype=torch.bool)
    for (layer, d, t, b), each in steps.items():
        lag = t if d else lengths[b] - 1 - t
        nodes = [node for step in each for node in (step.h, step.through)]
        gradients = torch.autograd.grad(
            h_n, nodes, vectors[d], retain_graph=True, materialize_grads=True
        )
        crossed = range(1, t + 1) if d else range(t + 1, lengths[b])
        there[d, lag, b] = reset is None or not any(reset[s, b] for s in crossed)
        squares[layer, d, lag, b] = sum(g.square().sum() for g in gradients[::2])
        factors[layer, d, lag, b] = sum(g.square().sum() for g in gradients[1::2]).sqrt()
    norms = squares.sqrt()
    factors[:, :, 1:] /= norms[:, :, :-1]
    factors[:, :, 0] = math.nan
    factors[(~there).expand_as(factors)] = math.nan
    squares[(~there).expand_as(squares)] = 0
    samples = there.sum(-1)
    assert torch.equal(found.samples, samples)
    for a, w in (
        (found.norm, (squares.sum(-1) / samples).sqrt()),
        (found.log_growth, factors.log().nanmean(-1)),
        (found.lyapunov, factors.log().nanmean((2, 3))),
    ):
        assert torch.equal(a.isnan(), w.isnan())
        assert ((a - w).abs() <= 1e-11 * (1 + w.abs()))[~w.isnan()].all(), (a, w)
    apart = found.flow.state_norm
    wanted = torch.zeros_like(apart)
    for b in range(B):
        for t in range(lengths[b]):
            wanted[:, 0, t, b] = norms[:, 0, lengths[b] - 1 - t, b]
            wanted[:, 1:, t, b] = norms[:, 1:, t, b]
    assert ((apart - wanted).abs() <= 1e-12 * wanted).all()


def test_vectors_are_of_norm_1_and_of_the_seed():
    h_n = torch.zeros(4, 3, 50, dtype=torch.float64)
    forward, reverse = _unit_vectors(h_n, 2, 0)
    assert not forward[:2].any()
    assert not forward[3].any()
    assert not reverse[:3].any()
    for v in (forward[2], reverse[3]):
        assert ((v.norm(dim=-1) - 1).abs() <= 1e-14).all()
    different = [forward[2], reverse[3], _unit_vectors(h_n, 2, 1)[0][2]]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert not (a == b).any()
    assert same(_unit_vectors(h_n, 2, 0), [forward, reverse])


# -------------------------------------------------------------------------------- what is wrong


def test_saturated_and_dead(own_backend):
    rnn = make(own_backend, bidirectional=True, num_layers=2)
    with torch.no_grad():
        rnn.bias_ih_l1.fill_(10)
    found = rnnfast.probe(rnn, inputs(50, B, IN))
    assert [[v.word for v in layer] for layer in found.verdicts][1][0] == "saturated"
    assert (found.verdict.word, found.verdict.layer, found.verdict.direction) == ("saturated", 1, 0)
    assert "flat ends of tanh" in found.summary
    rnn = make(own_backend, nonlinearity="relu", num_layers=2)
    with torch.no_grad():
        rnn.bias_ih_l1.fill_(-10)
    found = rnnfast.probe(rnn, inputs())
    assert (found.verdict.word, found.verdict.layer) == ("dead", 1)
    assert found.norm[1, 0, 1:].tolist() == [0.0] * (T - 1)
    assert "Hardly any unit of layer 1 is active" in found.summary


def test_nan_is_found_where_it_began(own_backend):
    rnn, x = make(own_backend, num_layers=2, bidirectional=True), inputs()
    x[3, 1, 0] = math.nan
    found = rnnfast.probe(rnn, x)
    assert found.verdict.word == "non-finite"
    assert found.first_nonfinite == (0, 0, 3, "state")
    assert "the state of layer 0 at step 3" in found.summary
    with torch.no_grad():
        rnn.weight_hh_l1_reverse[0, 0] = math.nan
    found = rnnfast.probe(rnn, inputs(), lengths=[6, 0, 3])
    assert found.first_nonfinite == (1, 1, 5, "state")


def test_a_gradient_that_overflows(own_backend):
    """States are 0, and a factor of 1e20 is too much at the second step back."""
    rnn = make(own_backend, 1, UNITS, dtype=torch.float32)
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.zero_()
        rnn.weight_hh_l0.copy_(1e20 * torch.eye(UNITS))
    found = rnnfast.probe(rnn, torch.zeros(T, B, 1))
    assert found.verdict.word == "non-finite"
    assert found.first_nonfinite == (0, 0, T - 3, "gradient")


def test_a_gradient_that_stops(own_backend):
    """All units are off at step 4: what was before has no influence on what comes after."""
    x = torch.zeros(50, 3, 1, dtype=torch.float64)
    x[40] = -1e3
    found = rnnfast.probe(linear(own_backend, 1.0), x)
    assert found.norm[0, 0].tolist() == [*found.norm[0, 0, :10].tolist(), *[0.0] * 40]
    assert (found.norm[0, 0, :10] > 0.99).all()
    assert found.log_growth[0, 0, 10] == -math.inf
    assert found.log_growth[0, 0, 11:].isnan().all()
    assert (found.half_life.item(), found.horizon.item()) == (0, 10)
    assert found.verdict.word == "vanishing"
    assert "10 steps later a thousand times less" in found.summary
    json.dumps(found.to_dict(), allow_nan=False)


def test_samples_that_stop_leave_the_others_growth(own_backend):
    x = torch.zeros(50, 3, 1, dtype=torch.float64)
    x[40, 1] = -1e3
    found = rnnfast.probe(linear(own_backend, 0.5), x)
    assert ((found.log_growth[0, 0, 1:] - math.log(0.5)).abs() < 1e-12).all()
    ratio = found.norm[0, 0, 20] / found.norm[0, 0, 0] * 2**20
    assert ratio.item() == pytest.approx(math.sqrt(2 / 3))
    assert found.half_life.item() == pytest.approx(1)


def test_a_reset_ends_the_way_back(own_backend):
    reset = torch.zeros(50, 3, dtype=torch.bool)
    reset[40, 1] = reset[20, 2] = True
    rnn, x = linear(own_backend, 0.5, bidirectional=True), torch.zeros(50, 3, 1).double()
    found = rnnfast.probe(rnn, x, reset=reset)
    assert found.samples.tolist() == [
        [3] * 10 + [2] * 20 + [1] * 20,
        [3] * 20 + [2] * 20 + [1] * 10,
    ]
    lags = torch.arange(50).double()
    assert ((found.norm[0] * 2**lags - 1).abs() < 1e-12).all()
    assert found.notes == [
        "a reset ends the way back of 2 of 3 samples, the first after 9 steps",
        "a reset ends the way back in reverse of 2 of 3 samples, the first after 19 steps",
    ]
    reset[20] = True
    found = rnnfast.probe(rnn, x, reset=reset)
    assert found.norm[0, 0, 30:].isnan().all()
    assert not found.out_of_range.any()
    assert found.half_life[0, 0].item() == pytest.approx(1)


def test_one_step_says_nothing(own_backend):
    found = rnnfast.probe(make(own_backend), inputs(1, B, IN))
    assert found.verdict.word == "unknown"
    assert found.summary.startswith("Nothing can be said")
    assert found.half_life.isnan().all()


def test_a_layer_that_keeps_beside_one_that_forgets(own_backend):
    rnn = linear(own_backend, 0.5, num_layers=2)
    with torch.no_grad():
        rnn.weight_hh_l1.copy_(torch.eye(UNITS))
        rnn.weight_ih_l1.copy_(torch.eye(UNITS))
    found = rnnfast.probe(rnn, torch.zeros(100, B, 1, dtype=torch.float64))
    assert [v.word for (v,) in found.verdicts] == ["vanishing", "healthy"]
    assert found.half_life.flatten().tolist() == [pytest.approx(1), math.inf]
    # Layer 1 sums layer 0's values: 1 + 1/2 + 1/4 + ...
    assert found.norm[0, 0, -1].item() == pytest.approx(2)
    assert "half of it is gone after 1 step," in found.summary
    assert "Layer 1 keeps it (without decay)" in found.summary


# ------------------------------------------------------------------------------- the network stays


def test_the_network_stays_as_it_is(own_backend):
    rnn = make(
        own_backend,
        num_layers=2,
        norm="batch",
        clip_state_grad=0.5,
        bptt_window=2,
        dropout=0.5,
        track_gradient_flow=True,
    )
    called = []
    rnn.register_forward_hook(lambda *_: called.append("forward"))
    rnn.register_forward_pre_hook(lambda *_: called.append("before"))
    rnn.register_full_backward_hook(lambda *_: called.append("backward"))
    rnn.weight_hh_l0.register_hook(lambda _: called.append("weight"))
    rnn(inputs().requires_grad_())[0].sum().backward()
    assert called
    called.clear()
    rnn.forward = lambda *_, **__: called.append("wrapped")
    flow, options = rnn.gradient_flow, rnn.extra_repr()
    state = copy.deepcopy(rnn.state_dict())
    gradients = {n: p.grad.clone() for n, p in rnn.named_parameters()}
    x = inputs(20, B, IN).requires_grad_()
    random = torch.get_rng_state()
    rnnfast.probe(rnn, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert called == []
    assert same(rnn.gradient_flow, flow)
    assert rnn.extra_repr() == options
    assert rnn.training
    assert x.grad is None
    assert rnn.state_dict().keys() == state.keys()
    for name, value in rnn.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, p in rnn.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name
    fresh = make(own_backend)
    rnnfast.probe(fresh, inputs())
    assert all(p.grad is None for p in fresh.parameters())
    with pytest.raises(RuntimeError, match="no backward pass"):
        _ = fresh.gradient_flow


def test_the_cures_of_training_are_off(own_backend):
    options = {"num_layers": 2, "bidirectional": True}
    plain = rnnfast.probe(make(own_backend, **options), inputs())
    cured = make(own_backend, clip_state_grad=0.01, bptt_window=2, dropout=0.9, **options)
    found = rnnfast.probe(cured, inputs())
    assert same(found.flow, plain.flow)
    assert found.flow.network["clip_state_grad"] == 0.01  # for the advice


def test_batch_norm_is_of_the_mode(own_backend):
    rnn = make(own_backend, norm="batch")
    x = 5 * inputs(20, B, IN)
    training, evaluating = rnnfast.probe(rnn, x), rnnfast.probe(rnn.eval(), x)
    assert not torch.equal(training.norm[..., 1:], evaluating.norm[..., 1:])
    assert not rnn.training


# ----------------------------------------------------------------------------- however it is called


def found_by(rnn: nn.Module, *args, **options) -> GradientFlow:
    return rnnfast.probe(rnn, *args, **options).flow


def test_the_same_wherever_it_is_called(own_backend):
    rnn, x = make(own_backend, num_layers=2), inputs()
    wanted = found_by(rnn, x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert same(found_by(rnn, inputs()), wanted)
            assert torch.is_grad_enabled() is False
    with torch.device("meta"):  # as set_default_device does
        assert rnnfast.probe(rnn, x).norm.isfinite().all()
    frozen = copy.deepcopy(rnn).requires_grad_(False)
    assert same(found_by(frozen, inputs()), wanted)
    assert same(found_by(rnn.eval(), inputs()), wanted)
    parametrized = parametrizations.orthogonal(make(own_backend), "weight_hh_l0")
    assert found_by(parametrized, inputs()).state_norm.isfinite().all()


def test_the_layouts_of_the_input(own_backend):
    options = {"num_layers": 2, "bidirectional": True}
    rnn, x, lengths = make(own_backend, **options), inputs(), [3, 6, 2]
    hx = inputs(4, B, H, seed=2)
    wanted = found_by(rnn, x, hx, lengths=lengths)
    first = make(own_backend, batch_first=True, **options)
    assert same(found_by(first, x.transpose(0, 1), hx, lengths=torch.tensor(lengths)), wanted)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    assert same(found_by(rnn, packed, hx), wanted)
    one = found_by(rnn, x[:, :1], hx[:, :1])
    assert same(found_by(rnn, x[:, 0], hx[:, 0]), one)
    assert same(found_by(first, x[:, 0], hx[:, 0]), one)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype, own_backend):
    """Factors of 1/2 have no rounding."""
    rnn = linear(own_backend, 0.5, dtype)
    found = rnnfast.probe(rnn, torch.zeros(30, B, 1, dtype=dtype))
    norm = found.norm[0, 0]
    assert abs(norm[0] - 1) <= torch.finfo(dtype).eps
    inside = norm >= 1e-4 if dtype == torch.float16 else norm >= 0
    assert torch.equal(found.out_of_range[0, 0], ~inside)
    error = (norm - norm[0] * 0.5 ** torch.arange(30, dtype=torch.float64)).abs()
    assert (error[inside] <= (0.01 if dtype == torch.float16 else 0) * norm[inside]).all()
    assert found.half_life.item() == pytest.approx(1, rel=0.01 if dtype == torch.float16 else 1e-12)


def test_under_autocast(own_backend):
    rnn, x = make(own_backend, dtype=torch.float32), inputs(dtype=torch.float32)
    wide = found_by(rnn, x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = found_by(rnn, x)
        assert torch.is_autocast_enabled("cpu")
    error = (narrow.state_norm - wide.state_norm).abs() / wide.state_norm
    assert 0 < error.max() < 0.1


def test_a_torch_rnn_is_measured_as_its_twin():
    old = nn.RNN(IN, H, 2, bidirectional=True, nonlinearity="relu", batch_first=True, dropout=0.5)
    called = []
    old.register_forward_hook(lambda *_: called.append(1))
    hook = old.register_load_state_dict_pre_hook(lambda module, *_: called.append(module))
    x = inputs(B, T, IN, dtype=torch.float32)
    found = found_by(old, x)
    assert called == []
    old.load_state_dict(old.state_dict())
    assert called == [old]
    hook.remove()
    assert same(found, found_by(rnnfast.replace(copy.deepcopy(old), report=None), x))


# ------------------------------------------------------------------------------------- bad input


class Kept(nn.RNN):
    pass


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (nn.LSTMCell(IN, H), "given LSTMCell, wanted an RNN, LSTM or GRU of rnnfast or torch.nn$"),
        (nn.Linear(IN, H), "given Linear, wanted an RNN, LSTM or GRU of rnnfast or torch.nn$"),
        (Kept(IN, H), "given Kept, wanted .* of rnnfast or torch.nn, not a subclass of it"),
        ("rnn", "given str, wanted"),
    ],
)
def test_what_is_no_rnn(module, complaint):
    with pytest.raises(TypeError, match=f"rnn: {complaint}"):
        rnnfast.probe(module, inputs())


def test_pruned_weights_are_named():
    old = nn.RNN(IN, H)
    prune.l1_unstructured(old, "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"rnn: pruning.*weight_hh_l0_mask"):
        rnnfast.probe(old, inputs(dtype=torch.float32))


def test_bad_input_by_name(own_backend):
    rnn = make(own_backend)
    far, whole = inputs().to("meta"), torch.ones(T, B, IN, dtype=torch.int64)
    for error, complaint, args, options in (
        (TypeError, "x: given list, wanted a tensor", ([1.0],), {}),
        (TypeError, "x: given torch.int64, wanted a floating-point dtype", (whole,), {}),
        (ValueError, "Expected input to be 2D or 3D", (inputs(T, B, IN, 1),), {}),
        (RuntimeError, "must be equal to input_size", (inputs(T, B, IN + 1),), {}),
        (RuntimeError, "Expected hidden size", (inputs(), inputs(1, B, H + 1)), {}),
        (RuntimeError, "input tensor at meta and parameter tensor at cpu", (far,), {}),
        (ValueError, "does not match", (inputs(dtype=torch.float32),), {}),
        (ValueError, "no sample has a step to begin at", (inputs(),), {"lengths": [0] * B}),
        (ValueError, "no sample has a step to begin at", (inputs(T, 0, IN),), {}),
        (RuntimeError, "sequence length to be larger than 0", (inputs(0, B, IN),), {}),
        (ValueError, "lengths: given 7", (inputs(),), {"lengths": [7, 1, 1]}),
        (TypeError, "reset: given list", (inputs(),), {"reset": [True]}),
    ):
        with pytest.raises(error, match=complaint):
            rnnfast.probe(rnn, *args, **options)


def test_a_backend_without_a_record_says_so():
    with pytest.raises(rnnfast.BackendError, match="track_gradient_flow"):
        rnnfast.probe(make("torch", track_gradient_flow=False), inputs())


# --------------------------------------------------------------------------------------- to see


def test_what_is_printed(own_backend):
    text = repr(rnnfast.probe(linear(own_backend, 0.5), torch.zeros(150, 3, 1).double()))
    assert text.splitlines() == [
        "Gradient probe over 150 steps, 3 samples",
        "layer  half-life  horizon  mean |f'|  verdict    because",
        "0      1          10       1          vanishing  gradient times 10^-45 over 150 steps",
        "The input of this network at a step moves its state 10 steps later a thousand times less "
        "than at once (half-life 1 step): it will hardly learn to remember longer than that.",
        "layer 0 is out of range from lag 100 on: the norm is below 1e-30",
        'try: nonlinearity="relu" with init="identity"',
        'try: nonlinearity="tanh" with init="orthogonal"',
        'try: nonlinearity="tanh" with init="glorot"',
        'try: nonlinearity="tanh" with norm="layer"',
    ]


def test_the_same_as_json(own_backend):
    found = rnnfast.probe(linear(own_backend, 0.5), torch.zeros(150, 3, 1).double())
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["summary"] == found.summary
    assert data["verdicts"][0][0]["word"] == "vanishing"
    assert data["norm"][0][0] == found.norm[0, 0].tolist()
    assert data["log_growth"][0][0][0] is None
    assert data["out_of_range"][0][0] == [lag >= 100 for lag in range(150)]
    assert data["samples"] == [[3] * 150]
    assert data["first_nonfinite"] is None
    assert data["network"]["nonlinearity"] == "relu"


def test_rich_shows_the_same(own_backend):
    console = pytest.importorskip("rich.console").Console(width=200)
    found = rnnfast.probe(linear(own_backend, 0.5), torch.zeros(150, 3, 1).double())
    with console.capture() as captured:
        console.print(found)
    for part in ("vanishing", "a thousand times less", "out of range", 'with norm="layer"'):
        assert part in captured.get()


def test_results_are_float64_on_the_cpu(own_backend):
    found = rnnfast.probe(make(own_backend, dtype=torch.float32), inputs(dtype=torch.float32))
    for name in ("norm", "log_growth", "lyapunov", "half_life", "horizon"):
        value: Tensor = getattr(found, name)
        assert (value.dtype, value.device.type) == (torch.float64, "cpu"), name


def test_the_picture_has_the_numbers(own_backend):
    pytest.importorskip("matplotlib")
    rnn = linear(own_backend, 0.5, num_layers=2)
    with torch.no_grad():
        rnn.weight_ih_l1.copy_(torch.eye(UNITS))
    found = rnnfast.probe(rnn, torch.zeros(150, 3, 1).double(), lengths=[120, 0, 3])
    panels = found.plot().axes
    assert [axes.get_title(loc="left").partition(",")[0] for axes in panels] == [
        "Layer 0: vanishing",
        "Layer 1: vanishing",
    ]
    for layer, axes in enumerate(panels):
        total, own, *_ = axes.get_lines()
        assert total.get_xdata().tolist() == list(range(120))
        shown = torch.as_tensor(total.get_ydata())
        wanted = found.norm[layer, 0, :120]
        inside = ~found.out_of_range[layer, 0, :120]
        assert torch.equal(shown[inside], wanted[inside])
        assert shown[~inside].isnan().all()
        start = wanted[0]
        halves = start * 0.5 ** torch.arange(100).double()
        assert torch.allclose(torch.as_tensor(own.get_ydata())[:100], halves, rtol=1e-10, atol=0)
