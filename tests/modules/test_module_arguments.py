"""The arguments and parameters of the modules against torch's: what a constructor takes, what it
refuses and how, and initial values."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from twins import EXACT, assert_same, assert_same_results, for_kind, outcome, results

import rnnfast

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


OF_RNN = {case for case in BAD_ARGUMENTS if case.startswith("nonlinearity")}
OF_RNN |= {"proj_size before all else"}  # its fourth argument is a nonlinearity
OF_LSTM = {
    "proj_size negative": ((3, 4), {"proj_size": -1}),
    "proj_size of hidden_size": ((3, 4), {"proj_size": 4}),
    "proj_size before num_layers": ((3, 4, 0), {"proj_size": 5}),
    "hidden_size before proj_size": ((3, 0), {"proj_size": -1}),
}


@pytest.mark.parametrize("case", [*BAD_ARGUMENTS, *OF_LSTM])
def test_constructor_refuses_as_torch_does(case, kind):
    of_this = {"RNN": BAD_ARGUMENTS.keys(), "GRU": BAD_ARGUMENTS.keys() - OF_RNN}.get(
        kind, (BAD_ARGUMENTS.keys() | OF_LSTM.keys()) - OF_RNN - {"proj_size"}
    )
    if case not in of_this:
        return
    args, options = (BAD_ARGUMENTS | OF_LSTM)[case]
    error, text = outcome(lambda: getattr(nn, kind)(*args, **options))
    assert issubclass(error, Exception)
    if text.startswith("Unknown nonlinearity"):  # there is a third one to select here
        text = text.replace("'tanh' or 'relu'", "'tanh', 'relu', 'sigmoid', 'softplus'")
    assert outcome(lambda: getattr(rnnfast, kind)(*args, **options)) == (error, text)


WRONG_CALLS = [
    ((), {}),
    ((3,), {}),
    ((3, 4), {"foo": 1}),
    ((3, 4), {"mode": "LSTM"}),
    ((3, 4, 1, "tanh", True, False, 0.0, False, None, None, 1), {}),
]


@pytest.mark.parametrize(("args", "options"), WRONG_CALLS)
def test_constructor_refuses_a_wrong_call(args, options, kind):
    if kind != "RNN":
        args = tuple(arg for arg in args if arg != "tanh")
    args = (*args, 1) if kind == "LSTM" and len(args) > 3 else args
    with pytest.raises(TypeError):
        getattr(nn, kind)(*args, **options)
    with pytest.raises(TypeError, match=rf"{kind}\.__init__\(\)"):
        getattr(rnnfast, kind)(*args, **options)


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
def test_bidirectional_goes_by_truth_value(value, backend, kind):
    rnn = getattr(rnnfast, kind)(3, 4, bidirectional=value, backend=backend)
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
def test_same_seed_gives_the_same_parameters_and_draws(case, kind):
    found = []
    for package in (nn, rnnfast):
        torch.manual_seed(3)
        module = getattr(package, kind)(3, 5, **for_kind(kind, OPTIONS[case]))
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


def test_public_attributes_are_those_of_torch(kind):
    own = ["relu"] if kind == "RNN" else []
    arguments = 3, 4, 2, *own, False, True, 0.25, True
    old, new = (getattr(package, kind)(*arguments) for package in (nn, rnnfast))
    own = ["nonlinearity"] if kind == "RNN" else []
    for name in (*nn.RNNBase.__annotations__, *own, "training"):
        assert getattr(new, name) == getattr(old, name), name
        assert type(getattr(new, name)) is type(getattr(old, name)), name
    assert isinstance(new, nn.RNNBase)
    assert not isinstance(new, type(old))  # torch.compile breaks the graph at every one


@pytest.mark.parametrize("case", OPTIONS)
def test_extra_repr_is_torchs(case, kind):
    options = {"batch_first": True, "dropout": 0.5, "num_layers": 2} | OPTIONS[case]
    options = for_kind(kind, options)
    if kind == "LSTM":
        options["proj_size"] = 2
    for given in ({}, options):
        new, old = (getattr(package, kind)(3, 5, **given) for package in (rnnfast, nn))
        relu = ", nonlinearity='relu'" if "nonlinearity" in given else ""
        assert repr(new) == repr(old).removesuffix(")") + relu + ")"


OWN = {
    "RNN": "init='identity', residual=True, backend='reference'",
    "LSTM": "init='glorot', residual=True, backend='cpu', forget_bias=1.0, return_cell_states=True",
    "GRU": "init='glorot', residual=True, num_heads=3, backend='cpu', chrono_steps=7",
}


def test_extra_repr_shows_what_is_not_the_default(kind):
    rnn = eval(f"rnnfast.{kind}(3, 3, 2, {OWN[kind]})")
    assert rnn.extra_repr() == f"3, 3, num_layers=2, {OWN[kind]}"
    assert repr(eval(f"rnnfast.{rnn!r}")) == repr(rnn)


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
def test_state_dict_loads_both_ways(case, assign, backend, kind):
    x = torch.randn(6, 2, 3, dtype=EXACT)
    old = getattr(nn, kind)(3, 5, dtype=EXACT, **for_kind(kind, OPTIONS[case]))
    new = getattr(rnnfast, kind)(
        3, 5, dtype=EXACT, backend=backend, **for_kind(kind, OPTIONS[case])
    )
    assert not torch.equal(new(x)[0], old(x)[0])
    assert (
        str(new.load_state_dict(old.state_dict(), assign=assign))
        == "<All keys matched successfully>"
    )
    wanted = results(old, x)
    assert_same_results(results(new, x), wanted)
    if assign:
        assert all(p.data_ptr() == q.data_ptr() for p, q in zip(old.parameters(), new.parameters()))
    back = getattr(nn, kind)(3, 5, dtype=EXACT, **for_kind(kind, OPTIONS[case]))
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
    ("nonlinearity", "gain"), [("relu", 2**0.5), ("tanh", 5 / 3), ("sigmoid", 1)]
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
