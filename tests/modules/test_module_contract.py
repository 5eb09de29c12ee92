"""rnnfast.RNN against nn.RNN: what it takes, what it refuses and how, what it gives back."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from twins import EXACT, assert_same, assert_same_results, results, twins

import rnnfast


def outcome(call):
    """The type and text of what `call` raises, or the type of what it returns."""
    try:
        return type(call()), ""
    except Exception as error:
        return type(error), str(error)


# Constructor

BAD_ARGUMENTS = {
    "proj_size": ((3, 4), {"proj_size": 0}),
    "proj_size before all else": ((3, 4, 1, "cube"), {"proj_size": 2, "foo": 1}),
    "nonlinearity before an unknown keyword": ((3, 4), {"nonlinearity": "cube", "foo": 1}),
    "nonlinearity None": ((3, 4), {"nonlinearity": None}),
    "nonlinearity a list": ((3, 4), {"nonlinearity": ["tanh"]}),
    "nonlinearity before dropout": ((3, 4), {"nonlinearity": "cube", "dropout": 2}),
    "dropout None": ((3, 4), {"dropout": None}),
    "dropout text": ((3, 4), {"dropout": "x"}),
    "dropout number in text": ((3, 4), {"dropout": "0.5"}),
    "dropout bool": ((3, 4), {"dropout": True}),
    "dropout nan": ((3, 4), {"dropout": math.nan}),
    "dropout below 0": ((3, 4), {"dropout": -0.1}),
    "dropout above 1": ((3, 4), {"dropout": 1.1}),
    "dropout tensor": ((3, 4), {"dropout": torch.tensor(0.5)}),
    "dropout before bias": ((3, 4), {"dropout": 2, "bias": 0}),
    "bias int": ((3, 4), {"bias": 0}),
    "bias None": ((3, 4), {"bias": None}),
    "bias before batch_first": ((3, 4), {"bias": 1, "batch_first": 1}),
    "batch_first text": ((3, 4), {"batch_first": "True"}),
    "batch_first before input_size": ((3.0, 4), {"batch_first": 1}),
    "input_size float": ((3.0, 4), {}),
    "input_size zero": ((0, 4), {}),
    "input_size negative, hidden_size float": ((-1, 4.0), {}),
    "hidden_size text": ((3, "4"), {}),
    "hidden_size zero": ((3, 0), {}),
    "num_layers zero": ((3, 4, 0), {}),
    "num_layers float": ((3, 4, 1.5), {}),
    "num_layers text": ((3, 4, "2"), {}),
    "integer dtype": ((3, 4), {"dtype": torch.int64}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_constructor_refuses_as_torch_does(case):
    args, options = BAD_ARGUMENTS[case]
    kind, text = outcome(lambda: nn.RNN(*args, **options))
    assert issubclass(kind, Exception)
    if text.startswith("Unknown nonlinearity"):  # there are more of them to select here
        text = text.replace("'tanh' or 'relu'", "'tanh', 'relu', 'sigmoid', 'softplus'")
    assert outcome(lambda: rnnfast.RNN(*args, **options)) == (kind, text)


WRONG_CALLS = [
    ((), {}),
    ((3,), {}),
    ((3, 4), {"foo": 1}),
    ((3, 4), {"mode": "LSTM"}),
    ((3, 4, 1, "tanh", True, False, 0.0, False, None, None, 1), {}),
]


@pytest.mark.parametrize(("args", "options"), WRONG_CALLS)
def test_constructor_refuses_a_wrong_call(args, options):
    with pytest.raises(TypeError):
        nn.RNN(*args, **options)
    with pytest.raises(TypeError, match=r"RNN\.__init__\(\)"):
        rnnfast.RNN(*args, **options)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"init": "xavier"}, ValueError, r"init: given 'xavier', wanted one of \['torch'"),
        ({"init": ["torch"]}, ValueError, r"init: given \['torch'\], wanted one of"),
        ({"residual": 1}, TypeError, "residual should be of type bool, got: int"),
        ({"backend": "gpu"}, ValueError, r"backend: given 'gpu', wanted one of \['auto'"),
        ({"backend": None}, ValueError, "backend: given None, wanted one of"),
        ({"backend": ["cpu"]}, ValueError, "backend: given .*, wanted one of"),
    ],
)
def test_constructor_refuses_bad_arguments_of_its_own(options, kind, text):
    with pytest.raises(kind, match=text):
        rnnfast.RNN(3, 4, **options)


def test_own_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        rnnfast.RNN(3, 4, 1, "tanh", True, False, 0.0, False, None, None, "orthogonal")


def test_dropout_on_one_layer_warns_as_torch_does():
    texts = []
    for kind in (nn.RNN, rnnfast.RNN):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            kind(3, 4, dropout=0.5)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("value", [1, "yes", None, 0])
def test_bidirectional_goes_by_truth_value(value, backend):
    rnn = rnnfast.RNN(3, 4, bidirectional=value, backend=backend)
    assert rnn(torch.randn(5, 2, 3))[0].shape == (5, 2, 8 if value else 4)


# Parameters

OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 3},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "no bias": {"num_layers": 2, "bias": False, "bidirectional": True},
    "relu": {"nonlinearity": "relu", "num_layers": 2},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_same_seed_gives_the_same_parameters_and_draws(case):
    found = []
    for kind in (nn.RNN, rnnfast.RNN):
        torch.manual_seed(3)
        module = kind(3, 5, **OPTIONS[case])
        module.reset_parameters()
        found.append((module, torch.rand(())))
    (old, draw), (new, new_draw) = found
    assert draw == new_draw
    assert list(old.state_dict()) == list(new.state_dict())
    assert [n for n, _ in old.named_parameters()] == [n for n, _ in new.named_parameters()]
    for x, y in zip(old.parameters(), new.parameters()):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert [len(w) for w in old.all_weights] == [len(w) for w in new.all_weights]
    assert all(w is getattr(new, n) for w, n in zip(new._flat_weights, new._flat_weights_names))
    assert new.flatten_parameters() is None


def test_public_attributes_are_those_of_torch():
    old = nn.RNN(3, 4, 2, "relu", False, True, 0.25, True)
    new = rnnfast.RNN(3, 4, 2, "relu", False, True, 0.25, True)
    for name in (*nn.RNNBase.__annotations__, "nonlinearity", "training"):
        assert getattr(new, name) == getattr(old, name), name
        assert type(getattr(new, name)) is type(getattr(old, name)), name
    assert isinstance(new, nn.RNNBase)
    assert not isinstance(new, nn.RNN)  # torch.compile breaks the graph at every nn.RNN


@pytest.mark.parametrize("case", OPTIONS)
def test_extra_repr_is_torchs(case):
    assert rnnfast.RNN(3, 5, nonlinearity="tanh").extra_repr() == nn.RNN(3, 5).extra_repr()
    options = {"batch_first": True, "dropout": 0.5, "num_layers": 2} | OPTIONS[case]
    if options["num_layers"] == 1:
        return
    new, old = rnnfast.RNN(3, 5, **options).extra_repr(), nn.RNN(3, 5, **options).extra_repr()
    assert new == old + (", nonlinearity='relu'" if case == "relu" else "")


def test_extra_repr_shows_what_is_not_the_default():
    rnn = rnnfast.RNN(3, 3, 2, init="identity", residual=True, backend="reference")
    options = "init='identity', residual=True, backend='reference'"
    assert rnn.extra_repr() == f"3, 3, num_layers=2, {options}"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_residual_warns_where_nothing_is_added(bidirectional):
    D = 1 + bidirectional
    options = {"residual": True, "bidirectional": bidirectional}
    for sizes in ((4 * D, 4, 1), (3, 4, 2), (4 * D + 1, 4, 2)):
        with pytest.warns(UserWarning, match="residual=True adds nothing with num_layers="):
            rnnfast.RNN(*sizes, **options)
    rnnfast.RNN(4 * D, 4, 2, **options)
    rnnfast.RNN(3, 4, 3, **options)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_both_ways(case, assign, backend):
    x = torch.randn(6, 2, 3, dtype=EXACT)
    old = nn.RNN(3, 5, dtype=EXACT, **OPTIONS[case])
    new = rnnfast.RNN(3, 5, dtype=EXACT, backend=backend, **OPTIONS[case])
    assert not torch.equal(new(x)[0], old(x)[0])
    assert (
        str(new.load_state_dict(old.state_dict(), assign=assign))
        == "<All keys matched successfully>"
    )
    wanted = results(old, x)
    assert_same_results(results(new, x), wanted)
    if assign:
        assert all(p.data_ptr() == q.data_ptr() for p, q in zip(old.parameters(), new.parameters()))
    back = nn.RNN(3, 5, dtype=EXACT, **OPTIONS[case])
    back.load_state_dict(new.state_dict(), assign=assign)
    assert_same_results(results(back, x), wanted)


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        rnnfast.RNN(3, 5).load_state_dict(nn.RNN(4, 5).state_dict())


# Initial values of its own


def layer_parameters(rnn, prefix):
    return [x.detach() for name, x in rnn.named_parameters() if name.startswith(prefix)]


@pytest.mark.parametrize("init", ["orthogonal", "identity", "glorot", "he"])
def test_own_inits_have_no_bias(init):
    rnn = rnnfast.RNN(3, 5, 2, bidirectional=True, init=init)
    biases = layer_parameters(rnn, "bias")
    assert len(biases) == 8
    assert all((b == 0).all() for b in biases)


def test_orthogonal_init():
    rnn = rnnfast.RNN(300, 200, 2, bidirectional=True, init="orthogonal", dtype=torch.float64)
    for w in layer_parameters(rnn, "weight_hh"):
        assert_same(w @ w.T, torch.eye(200, dtype=torch.float64))
    for w in layer_parameters(rnn, "weight_ih"):
        check_uniform(w, math.sqrt(6 / sum(w.shape)))


def test_identity_init():
    rnn = rnnfast.RNN(300, 200, init="identity")
    assert torch.equal(rnn.weight_hh_l0, torch.eye(200))
    check_normal(rnn.weight_ih_l0.detach(), 0.001)


def test_glorot_init():
    rnn = rnnfast.RNN(300, 200, 2, init="glorot")
    for w in layer_parameters(rnn, "weight"):
        check_uniform(w, math.sqrt(6 / sum(w.shape)))


@pytest.mark.parametrize(
    ("nonlinearity", "gain"),
    [("relu", 2**0.5), ("tanh", 5 / 3), ("sigmoid", 1), ("softplus", 2**0.5)],
)
def test_he_init(nonlinearity, gain):
    rnn = rnnfast.RNN(300, 200, 2, nonlinearity, init="he")
    for w in layer_parameters(rnn, "weight"):
        check_normal(w, gain / math.sqrt(w.shape[1]))


def check_uniform(w, bound):
    """Kolmogorov-Smirnov; n is at least 40000, and 1.95 / sqrt(n) is passed once in 1000 times."""
    check_distribution((w.double() / bound + 1) / 2, w.numel())
    assert w.abs().max() <= bound


def check_normal(w, std):
    check_distribution(torch.special.ndtr(w.double() / std), w.numel())


def check_distribution(ranks, n):
    assert n >= 40000
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (ranks.flatten().sort().values - steps).abs().max() < 1.95 / math.sqrt(n)


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
def test_forward_refuses_as_torch_does(case, backend):
    old, new = twins(backend, 3, 4, 2, dtype=torch.float32)
    wanted = outcome(lambda: old(*BAD_INPUTS[case]))
    assert issubclass(wanted[0], Exception)
    assert outcome(lambda: new(*BAD_INPUTS[case])) == wanted


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 3)])
def test_batch_first_refuses_no_steps(shape, backend):
    old, new = twins(backend, 3, 4, batch_first=True, dtype=torch.float32)
    wanted = outcome(lambda: old(tensor(*shape)))
    assert wanted[0] is RuntimeError
    assert outcome(lambda: new(tensor(*shape))) == wanted


def test_hx_of_another_dtype_is_refused(backend):
    old, new = twins(backend, 3, 4, dtype=torch.float32)
    for rnn in (old, new):
        with pytest.raises(RuntimeError):
            rnn(tensor(5, 2, 3), tensor(1, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (("meta", "cpu"), "Input and hidden tensors are not at the same device"),
        (("cpu", "meta"), "Input and hidden tensors are not at the same device"),
        (("meta", None), "Input and parameter tensors are not at the same device"),
    ],
)
def test_tensors_on_two_devices_are_refused(devices, text, backend):
    _, new = twins(backend, 3, 4, dtype=torch.float32)
    hx = devices[1] and tensor(1, 2, 4, device=devices[1])
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
def test_values_and_gradients_are_torchs(case, with_hx, unbatched, H, backend):
    old, new = twins(backend, 3, H, **VARIANTS[case])
    layers = VARIANTS[case].get("num_layers", 1) * (1 + VARIANTS[case].get("bidirectional", False))
    x = torch.randn(*((7, 3) if unbatched else (7, 2, 3)), dtype=EXACT)
    batch = () if unbatched else (x.shape[0 if VARIANTS[case].get("batch_first") else 1],)
    hx = torch.randn(layers, *batch, H, dtype=EXACT) if with_hx else None
    assert_same_results(results(new, x, hx), results(old, x, hx))


def test_one_step(backend):
    old, new = twins(backend, 3, 5, 2, bidirectional=True)
    x, hx = torch.randn(1, 2, 3).to(EXACT), torch.randn(4, 2, 5).to(EXACT)
    assert_same_results(results(new, x, hx), results(old, x, hx))


def test_no_hx_is_a_zero_hx(backend):
    _, new = twins(backend, 3, 5, 2, bidirectional=True)
    x = torch.randn(6, 2, 3).to(EXACT)
    wanted = results(new, x, torch.zeros(4, 2, 5).to(EXACT))
    del wanted["d hx"]
    assert_same_results(results(new, x), wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_empty_batch_runs_forward_and_backward(batch_first, with_hx, backend):
    old, new = twins(backend, 3, 5, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(*((0, 6) if batch_first else (6, 0)), 3).to(EXACT)
    hx = torch.randn(4, 0, 5).to(EXACT) if with_hx else None
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
def test_any_strides_of_input_and_hx(layout, backend):
    old, new = twins(backend, 3, 5, 2)
    x, hx = torch.randn(6, 4, 3).to(EXACT), torch.randn(2, 4, 5).to(EXACT)
    x, hx = LAYOUTS[layout](x), LAYOUTS[layout](hx)
    for got, wanted in zip(new(x, hx), old(x, hx)):
        assert_same(got, wanted)
    upstream = torch.randn(6, 4, 5).to(EXACT)
    for make in LAYOUTS.values():  # gradients come in any layout, too
        (new_grad,) = torch.autograd.grad(new(x, hx)[0], new.weight_hh_l0, make(upstream))
        (old_grad,) = torch.autograd.grad(old(x, hx)[0], old.weight_hh_l0, make(upstream))
        assert_same(new_grad, old_grad)


def test_outputs_share_no_memory(backend):
    _, new = twins(backend, 3, 5)
    x, hx = torch.randn(1, 2, 3).to(EXACT), torch.randn(1, 2, 5).to(EXACT)
    with torch.no_grad():
        for lengths in (None, [0, 1], [0, 0]):
            kept = x.clone(), hx.clone()
            output, h_n = new(x, hx, lengths=lengths)
            assert torch.equal(hx, kept[1])
            before = h_n.clone()
            output.fill_(9)
            assert torch.equal(h_n, before)
            h_n.fill_(9)
            assert torch.equal(x, kept[0])
            assert torch.equal(hx, kept[1])


# Dropout


def test_dropout_acts_between_layers_alone(backend):
    """At p = 1 the second layer sees zeros; the first one's h_n and the last output are whole."""
    options = {"num_layers": 2, "bidirectional": True, "dropout": 1.0}
    old, new = twins(backend, 3, 5, **options)
    x = torch.randn(6, 2, 3).to(EXACT)
    output, h_n = new(x)
    wanted, wanted_h_n = old(x)
    assert_same(output, wanted)
    assert_same(h_n, wanted_h_n)
    assert (output != 0).all()
    assert_same(h_n[:2], new.eval()(x)[1][:2])


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


def test_dropout_is_reproducible_and_draws_nothing_in_eval(backend):
    _, new = twins(backend, 3, 5, 2, dropout=0.5)
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


def test_dropout_can_be_changed_at_run_time(backend):
    """PyTorch's test_RNN_change_dropout."""
    _, new = twins(backend, 3, 50, 2)
    x = torch.randn(6, 2, 3).to(EXACT)
    plain = new(x)[0]
    new.dropout = 0.5
    assert not torch.equal(new(x)[0], plain)
    new.dropout = 0.0
    assert torch.equal(new(x)[0], plain)


def test_dropout_gradient_uses_the_mask_of_the_forward_pass(backend):
    if torch.float64 != EXACT:
        pytest.skip("differences have too few digits in float32")
    _, new = twins(backend, 2, 3, 2, dropout=0.5)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def forward(x):
        torch.manual_seed(1)
        return new(x)

    assert torch.autograd.gradcheck(forward, (x,))


# Options that nn.RNN lacks


def loop(rnn, x, hx):
    """The equations, written once more: one cell call a step, all in plain operations."""
    name = rnn.nonlinearity
    f = nn.functional.softplus if name == "softplus" else getattr(torch, name)
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


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid", "softplus"])
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


def test_default_dtype_and_device_context_are_heeded():
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert rnnfast.RNN(3, 4).weight_hh_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(old)
    with torch.device("meta"):
        assert rnnfast.RNN(3, 4).weight_hh_l0.device.type == "meta"


def test_construction_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnfast.RNN(3, 4, 2, dropout=0.5)
