"""The modules against torch's: what forward takes, what it refuses and how, what it gives back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    assert_same,
    assert_same_results,
    for_kind,
    outcome,
    results,
    start,
    tensors,
    twins,
)

import rnnfast

# Errors of forward, in torch's order


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD_INPUTS = {
    "1-D": (tensor(3), None),
    "4-D": (tensor(2, 2, 2, 3), None),
    "4-D before hx": (tensor(2, 2, 2, 3), tensor(1)),
    "hx 2-D for batched": (tensor(5, 2, 3), tensor(2, 4)),
    "hx 3-D for unbatched": (tensor(5, 3), tensor(2, 1, 4)),
    "hx rank before dtype": (tensor(5, 2, 3, dtype=torch.float64), tensor(2, 4)),
    "dtype": (tensor(5, 2, 3, dtype=torch.float64), None),
    "dtype half": (tensor(5, 3, dtype=torch.float16), None),
    "dtype before features": (tensor(5, 2, 7, dtype=torch.int64), None),
    "features": (tensor(5, 2, 7), None),
    "features unbatched": (tensor(5, 7), None),
    "features before hx": (tensor(5, 2, 7), tensor(1, 2, 4)),
    "hx layers": (tensor(5, 2, 3), tensor(1, 2, 4)),
    "hx batch": (tensor(5, 2, 3), tensor(2, 3, 4)),
    "hx width": (tensor(5, 2, 3), tensor(2, 2, 5)),
    "hx width unbatched": (tensor(5, 3), tensor(2, 5)),
    "hx shape before T = 0": (tensor(0, 2, 3), tensor(2, 2, 5)),
    "T = 0": (tensor(0, 2, 3), None),
    "T = 0 unbatched": (tensor(0, 3), None),
    "T = 0, B = 0": (tensor(0, 0, 3), None),
    "None": (None, None),
    "list": ([[1.0, 2.0, 3.0]], None),
    "hx tuple": (tensor(5, 2, 3), (tensor(2, 2, 4),)),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_forward_refuses_as_torch_does(case, backend, kind):
    old, new = twins(backend, 3, 4, 2, dtype=torch.float32, kind=kind)
    input, hx = BAD_INPUTS[case]
    if kind == "LSTM" and isinstance(hx, tuple):
        return  # it takes a tuple
    hx = hx if hx is None or isinstance(hx, tuple) else start(kind, hx)
    wanted = outcome(lambda: old(input, hx))
    assert issubclass(wanted[0], Exception)
    assert outcome(lambda: new(input, hx)) == wanted


BAD_PAIRS = {
    "c 2-D": (tensor(2, 2, 4), tensor(2, 4)),
    "c batch": (tensor(2, 2, 4), tensor(2, 3, 4)),
    "c layers": (tensor(2, 2, 4), tensor(1, 2, 4)),
    "c width": (tensor(2, 2, 4), tensor(2, 2, 5)),
    "h before c": (tensor(2, 2, 5), tensor(2, 3, 4)),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_lstm_refuses_a_pair_as_torch_does(case, backend):
    old, new = twins(backend, 3, 4, 2, dtype=torch.float32, kind="LSTM")
    wanted = outcome(lambda: old(tensor(5, 2, 3), BAD_PAIRS[case]))
    assert wanted[0] is RuntimeError
    assert outcome(lambda: new(tensor(5, 2, 3), BAD_PAIRS[case])) == wanted


@pytest.mark.parametrize("hx", [tensor(2, 2, 4), (tensor(2, 2, 4),), (tensor(2, 2, 4),) * 3])
def test_lstm_refuses_all_but_a_pair(hx, backend):
    """By a TypeError; nn.LSTM takes the first and second entry of anything."""
    _, new = twins(backend, 3, 4, 2, dtype=torch.float32, kind="LSTM")
    with pytest.raises(TypeError, match=r"hx: given .*, wanted a tuple \(h_0, c_0\)"):
        new(tensor(5, 2, 3), hx)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 3)])
def test_batch_first_refuses_no_steps(shape, backend, kind):
    old, new = twins(backend, 3, 4, batch_first=True, dtype=torch.float32, kind=kind)
    wanted = outcome(lambda: old(tensor(*shape)))
    assert wanted[0] is RuntimeError
    assert outcome(lambda: new(tensor(*shape))) == wanted


def test_hx_of_another_dtype_is_refused(backend, kind):
    old, new = twins(backend, 3, 4, dtype=torch.float32, kind=kind)
    for rnn in (old, new):
        with pytest.raises(RuntimeError):
            rnn(tensor(5, 2, 3), start(kind, tensor(1, 2, 4, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (("meta", "cpu"), "Input and hidden tensors are not at the same device"),
        (("cpu", "meta"), "Input and hidden tensors are not at the same device"),
        (("meta", None), "Input and parameter tensors are not at the same device"),
    ],
)
def test_tensors_on_two_devices_are_refused(devices, text, backend, kind):
    _, new = twins(backend, 3, 4, dtype=torch.float32, kind=kind)
    hx = devices[1] and start(kind, tensor(1, 2, 4, device=devices[1]))
    with pytest.raises(RuntimeError, match=text):
        new(tensor(5, 2, 3, device=devices[0]), hx)


# Results of forward

VARIANTS = {
    "plain": {},
    "relu": {"nonlinearity": "relu"},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "deep, both ways": {"num_layers": 2, "bidirectional": True},
    "deep, both ways, batch first": {"num_layers": 3, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("H", [1, 5])
def test_values_and_gradients_are_torchs(case, with_hx, unbatched, H, backend, kind):
    old, new = twins(backend, 3, H, **for_kind(kind, VARIANTS[case]), kind=kind)
    layers = VARIANTS[case].get("num_layers", 1) * (1 + VARIANTS[case].get("bidirectional", False))
    x = torch.randn(*((7, 3) if unbatched else (7, 2, 3)), dtype=EXACT)
    batch = () if unbatched else (x.shape[0 if VARIANTS[case].get("batch_first") else 1],)
    hx = start(kind, torch.randn(layers, *batch, H, dtype=EXACT)) if with_hx else None
    assert_same_results(results(new, x, hx), results(old, x, hx))


def test_one_step(backend, kind):
    old, new = twins(backend, 3, 5, 2, bidirectional=True, kind=kind)
    x, hx = torch.randn(1, 2, 3).to(EXACT), start(kind, torch.randn(4, 2, 5).to(EXACT))
    assert_same_results(results(new, x, hx), results(old, x, hx))


def test_no_hx_is_a_zero_hx(backend, kind):
    _, new = twins(backend, 3, 5, 2, bidirectional=True, kind=kind)
    x = torch.randn(6, 2, 3).to(EXACT)
    wanted = results(new, x, start(kind, torch.zeros(4, 2, 5).to(EXACT)))
    wanted = {name: value for name, value in wanted.items() if name not in ("d hx", "d cx")}
    assert_same_results(results(new, x), wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_empty_batch_runs_forward_and_backward(batch_first, with_hx, backend, kind):
    old, new = twins(backend, 3, 5, 2, bidirectional=True, batch_first=batch_first, kind=kind)
    x = torch.randn(*((0, 6) if batch_first else (6, 0)), 3).to(EXACT)
    hx = start(kind, torch.randn(4, 0, 5).to(EXACT)) if with_hx else None
    found = results(new, x, hx)
    assert_same_results(found, results(old, x, hx))
    assert (found["d weight_hh_l0"] == 0).all()


LAYOUTS = {
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other step": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features outermost": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "expanded over the batch": lambda x: x[:, :1].expand_as(x),
    "expanded over time": lambda x: x[:1].expand_as(x),
    "one value": lambda x: x[:1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_input_and_hx(layout, backend, kind):
    old, new = twins(backend, 3, 5, 2, kind=kind)
    x, hx = torch.randn(6, 4, 3).to(EXACT), torch.randn(2, 4, 5).to(EXACT)
    x, hx = LAYOUTS[layout](x), start(kind, LAYOUTS[layout](hx))
    for got, wanted in zip(new(x, hx), old(x, hx)):
        for a, b in zip(tensors(got), tensors(wanted)):
            assert_same(a, b)
    upstream = torch.randn(6, 4, 5).to(EXACT)
    for make in LAYOUTS.values():  # gradients come in any layout, too
        (new_grad,) = torch.autograd.grad(new(x, hx)[0], new.weight_hh_l0, make(upstream))
        (old_grad,) = torch.autograd.grad(old(x, hx)[0], old.weight_hh_l0, make(upstream))
        assert_same(new_grad, old_grad)


def test_outputs_share_no_memory(backend, kind):
    _, new = twins(backend, 3, 5, kind=kind)
    x, hx = torch.randn(1, 2, 3).to(EXACT), start(kind, torch.randn(1, 2, 5).to(EXACT))
    new.return_cell_states = kind == "LSTM" and new.backend != "torch"
    with torch.no_grad():
        for lengths in (None, [0, 1], [0, 0]):
            given = x, *tensors(hx)
            kept = [v.clone() for v in given]
            output, h_n, *cells = new(x, hx, lengths=lengths)
            results = output, *tensors(h_n), *cells
            assert all(map(torch.equal, given, kept))
            for i, result in enumerate(results):
                later = [v.clone() for v in results[i + 1 :]]
                result.fill_(9)
                assert all(map(torch.equal, results[i + 1 :], later))
            assert all(map(torch.equal, given, kept))


# Dropout


def test_dropout_acts_between_layers_alone(backend, kind):
    """At p = 1 the second layer sees zeros; the first one's h_n and the last output are whole."""
    options = {"num_layers": 2, "bidirectional": True, "dropout": 1.0}
    old, new = twins(backend, 3, 5, **options, kind=kind)
    x = torch.randn(6, 2, 3).to(EXACT)
    output, h_n = new(x)
    wanted, wanted_h_n = old(x)
    assert_same(output, wanted)
    whole = new.eval()(x)[1]
    for a, b, c in zip(tensors(h_n), tensors(wanted_h_n), tensors(whole)):
        assert_same(a, b)
        assert_same(a[:2], c[:2])
    assert (output != 0).all()


def test_dropout_is_inverted_with_its_probability(backend):
    """A last layer with W_ih = I, no recurrence and relu shows what comes through."""
    _, new = twins(backend, 3, 50, 2, "relu", dropout=0.25, bias=False)
    with torch.no_grad():
        new.weight_ih_l1.copy_(torch.eye(50))
        new.weight_hh_l1.zero_()
        x = torch.randn(40, 20, 3).to(EXACT)
        through = new(x)[0]
        whole = new.eval()(x)[0]
    kept = through != 0
    assert_same(through[kept], whole[kept] / 0.75)
    n = int((whole > 0).sum())
    sigma = math.sqrt(0.25 * 0.75 / n)
    assert abs(float(kept.sum()) / n - 0.75) < 4 * sigma


def test_dropout_is_reproducible_and_draws_nothing_in_eval(backend, kind):
    _, new = twins(backend, 3, 5, 2, dropout=0.5, kind=kind)
    x = torch.randn(6, 2, 3).to(EXACT)
    torch.manual_seed(5)
    first, second = new(x)[0], new(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(new(x)[0], first)
    state = torch.get_rng_state()
    new.eval()
    assert torch.equal(new(x)[0], new(x)[0])
    new.train().dropout = 0.0
    new(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_can_be_changed_at_run_time(backend, kind):
    """PyTorch's test_RNN_change_dropout."""
    _, new = twins(backend, 3, 50, 2, kind=kind)
    x = torch.randn(6, 2, 3).to(EXACT)
    plain = new(x)[0]
    new.dropout = 0.5
    assert not torch.equal(new(x)[0], plain)
    new.dropout = 0.0
    assert torch.equal(new(x)[0], plain)


def test_dropout_gradient_uses_the_mask_of_the_forward_pass(backend, kind):
    if torch.float64 != EXACT:
        pytest.skip("differences have too few digits in float32")
    _, new = twins(backend, 2, 3, 2, dropout=0.5, kind=kind)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def forward(x):
        torch.manual_seed(1)
        output, h_n = new(x)
        return output, *tensors(h_n)

    assert torch.autograd.gradcheck(forward, (x,))


# Options that nn.RNN lacks


def loop(rnn, x, hx):
    """The equations, written once more: one cell call a step, all in plain operations."""
    f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}[rnn.nonlinearity]
    D = 2 if rnn.bidirectional else 1
    u, h_n = x, []
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(D):
            end = f"l{layer}" + ("_reverse" if d else "")
            w_ih, w_hh = getattr(rnn, f"weight_ih_{end}"), getattr(rnn, f"weight_hh_{end}")
            b = getattr(rnn, f"bias_ih_{end}") + getattr(rnn, f"bias_hh_{end}") if rnn.bias else 0
            h, steps = hx[layer * D + d], {}
            for t in range(len(u) - 1, -1, -1) if d else range(len(u)):
                h = steps[t] = f(u[t] @ w_ih.T + b + h @ w_hh.T)
            outputs.append(torch.stack([steps[t] for t in range(len(u))]))
            h_n.append(h)
        y = torch.cat(outputs, -1)
        u = y + u if rnn.residual and y.shape == u.shape and layer + 1 < rnn.num_layers else y
    return y, torch.stack(h_n)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("input_size", [3, 8])
def test_sigmoid_and_residual_against_a_loop(
    nonlinearity, residual, bidirectional, input_size, own_backend
):
    """Input 8 agrees in width with 8 = D * H, so that layer 0 has a residual connection, too."""
    H = 4 if bidirectional else 8
    rnn = rnnfast.RNN(
        input_size,
        H,
        3,
        nonlinearity,
        bidirectional=bidirectional,
        residual=residual,
        dtype=EXACT,
        backend=own_backend,
    )
    x = torch.randn(5, 2, input_size).to(EXACT)
    hx = torch.randn(3 * (1 + bidirectional), 2, H).to(EXACT)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self._parameters = rnn._parameters

        def forward(self, x, hx):
            return loop(rnn, x, hx)

    assert_same_results(results(rnn, x, hx), results(Loop(), x, hx))


def test_sigmoid_on_auto_needs_no_choice():
    rnn = rnnfast.RNN(3, 4, 3, nonlinearity="sigmoid", residual=True, dtype=EXACT)
    assert rnn.mode == "RNN_SIGMOID"
    x, hx = torch.randn(5, 2, 3).to(EXACT), torch.zeros(3, 2, 4).to(EXACT)
    assert_same(rnn(x)[0], loop(rnn, x, hx)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes_run(dtype):
    """On whatever "auto" takes: no kernel of ours knows complex numbers."""
    rnn = rnnfast.RNN(3, 4, 2, dtype=dtype)
    output, h_n = rnn(torch.randn(5, 2, 3, dtype=dtype))
    output.abs().float().sum().backward()
    assert output.dtype == h_n.dtype == rnn.weight_hh_l0.grad.dtype == dtype
    assert output.isfinite().all()
