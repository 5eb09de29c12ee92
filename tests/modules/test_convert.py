"""rnnfast.replace and rnnfast.to_torch: a model goes on as if nothing had happened."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from twins import assert_same

import rnnfast

T, B, I, H = 6, 3, 4, 5  # noqa: E741


class Model(nn.Module):
    """Recurrent layers where models have them: an attribute, a Sequential, a ModuleDict."""

    def __init__(self, kind=nn.RNN):
        super().__init__()
        self.encoder = kind(I, H, 2, bidirectional=True, dtype=torch.float64)
        self.middle = nn.Sequential(nn.Linear(2 * H, I, dtype=torch.float64), nn.Tanh())
        self.rest = nn.ModuleDict(
            {"list": nn.ModuleList([kind(I, H, nonlinearity="relu", dtype=torch.float64)])}
        )

    def forward(self, x):
        return self.rest["list"][0](self.middle(self.encoder(x)[0]))[0]


def train(model, optimizer, steps):
    losses = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(T, B, I, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def kinds(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.RNNBase)]


def quiet(model):
    return rnnfast.replace(model, report=None)


def test_replace_shares_the_parameters_and_returns_the_model():
    model = Model()
    before = dict(model.named_parameters())
    assert quiet(model) is model
    assert kinds(model) == [rnnfast.RNN] * 2
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_optimizer_goes_on_through_replace_and_to_torch():
    """Adam keeps its moments: the curve is that of a model nobody touched."""
    model = Model()
    untouched = copy.deepcopy(model)
    theirs = torch.optim.Adam(untouched.parameters(), lr=0.01)
    ours = torch.optim.Adam(model.parameters(), lr=0.01)
    for convert in (lambda m: m, quiet, lambda m: rnnfast.to_torch(m, report=None)):
        convert(model)
        assert_same(train(model, ours, 5), train(untouched, theirs, 5))
    assert kinds(model) == [nn.RNN] * 2
    for p, q in zip(model.parameters(), untouched.parameters()):
        assert_same(p.detach(), q.detach())


def test_checkpoint_goes_back_into_the_original():
    model = quiet(Model())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    original = Model()
    original.load_state_dict(model.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert_same(model(x), original(x))
    again = quiet(Model())
    again.load_state_dict(original.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("there", [nn.RNN, rnnfast.RNN])
def test_all_options_come_along(there):
    old = there(I, H, 3, "relu", bias=False, batch_first=True, dropout=0.25, bidirectional=True)
    old.dropout = 0.125
    old.eval()
    old.weight_hh_l1.requires_grad_(False)
    new = (quiet if there is nn.RNN else lambda m: rnnfast.to_torch(m, report=None))(old)
    assert type(new) is (rnnfast.RNN if there is nn.RNN else nn.RNN)
    for name in (*nn.RNNBase.__annotations__, "nonlinearity", "training"):
        assert getattr(new, name) == getattr(old, name), name
    assert not new.weight_hh_l1.requires_grad
    x = torch.randn(B, T, I)
    torch.testing.assert_close(new(x)[0], old(x)[0])


def test_root_module_gets_a_twin():
    old = nn.RNN(I, H)
    new = quiet(old)
    assert type(new) is rnnfast.RNN
    assert new.weight_hh_l0 is old.weight_hh_l0
    back = rnnfast.to_torch(new, report=None)
    assert type(back) is nn.RNN
    assert back.weight_hh_l0 is old.weight_hh_l0
    with torch.no_grad():
        old.weight_hh_l0.zero_()
    x = torch.randn(T, B, I)
    torch.testing.assert_close(back(x)[0], old(x)[0])


def test_replace_draws_nothing():
    model = Model()
    state = torch.get_rng_state()
    quiet(model)
    rnnfast.to_torch(model, report=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shared_module_stays_shared():
    rnn = nn.RNN(I, I)
    model = nn.Module()
    model.first, model.second = rnn, rnn
    model.deep = nn.Sequential(nn.Identity(), rnn, nn.ModuleList([rnn]))
    lines = []
    rnnfast.replace(model, report=lines.append)
    assert type(model.first) is rnnfast.RNN
    assert model.second is model.first
    assert model.deep[1] is model.first
    assert model.deep[2][0] is model.first
    assert len(lines) == 1


def test_shared_parameters_stay_shared():
    model = nn.Sequential(nn.RNN(I, I), nn.RNN(I, I))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    quiet(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert len(list(model.parameters())) == 7


def test_tied_directions_stay_tied():
    rnn = nn.RNN(I, H, bidirectional=True)
    rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    new = quiet(rnn)
    assert new.weight_hh_l0_reverse is new.weight_hh_l0 is rnn.weight_hh_l0


# Hooks


@pytest.mark.parametrize("convert", [quiet, lambda m: rnnfast.to_torch(quiet(m), report=None)])
def test_hooks_go_on_and_their_handles_remove_them(convert):
    model, seen = nn.Sequential(nn.RNN(I, H)), []

    def hook(name):
        return lambda module, *args, **kwargs: seen.append((name, type(module)))

    rnn = model[0]
    handles = [
        rnn.register_forward_pre_hook(hook("pre")),
        rnn.register_forward_pre_hook(hook("pre, kwargs"), with_kwargs=True),
        rnn.register_forward_hook(hook("forward")),
        rnn.register_forward_hook(hook("forward, kwargs"), with_kwargs=True),
        rnn.register_full_backward_pre_hook(hook("backward pre")),
        rnn.register_full_backward_hook(hook("backward")),
        rnn.register_state_dict_pre_hook(hook("save")),
        rnn.register_state_dict_post_hook(hook("saved")),
        rnn.register_load_state_dict_pre_hook(hook("load")),
        rnn.register_load_state_dict_post_hook(hook("loaded")),
    ]
    del rnn
    convert(model)
    gc.collect()  # nothing of the old module is needed

    def use():
        seen.clear()
        model[0](torch.randn(T, B, I, requires_grad=True))[0].sum().backward()
        model.load_state_dict(model.state_dict())
        return [name for name, _ in seen]

    names = [
        *("pre", "pre, kwargs", "forward", "forward, kwargs", "backward pre", "backward"),
        *("save", "saved", "load", "loaded"),
    ]
    assert use() == names
    assert {kind for _, kind in seen} == {type(model[0])}
    for handle in handles:
        handle.remove()
    assert use() == []


def test_always_called_hook_goes_on():
    model, seen = nn.Sequential(nn.RNN(I, H)), []
    model[0].register_forward_hook(lambda *args: seen.append(1), always_call=True)
    quiet(model)
    with pytest.raises(RuntimeError, match="input_size"):
        model[0](torch.randn(T, B, I + 1))
    assert seen == [1]


# What is left as it is


class Subclass(nn.RNN):
    pass


class OwnSubclass(rnnfast.RNN):
    pass


def pruned(kind):
    return prune.l1_unstructured(kind(I, H), "weight_hh_l0", 0.5)


def normed(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(kind(I, H), "weight_hh_l0")


def parametrized(kind):
    return parametrizations.orthogonal(kind(I, H), "weight_hh_l0")


def with_buffer(kind):
    rnn = kind(I, H)
    rnn.register_buffer("seen", torch.zeros(()))
    return rnn


KEPT = {
    "subclass": (lambda kind: Subclass(I, H) if kind is nn.RNN else OwnSubclass(I, H), "ubclass"),
    "parametrized": (parametrized, "ParametrizedRNN is a subclass"),
    "pruned": (pruned, "changed weight_hh_l0, weight_hh_l0_mask, weight_hh_l0_orig"),
    "legacy weight_norm": (normed, "changed weight_hh_l0, weight_hh_l0_g, weight_hh_l0_v"),
    "a buffer of the user's": (with_buffer, "changed seen"),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("kind", [nn.RNN, rnnfast.RNN])
def test_what_cannot_be_swapped_is_kept_and_reported(case, kind):
    make, reason = KEPT[case]
    special, lines = make(kind), []
    model = nn.Sequential(special, kind(I, H))
    convert = rnnfast.replace if kind is nn.RNN else rnnfast.to_torch
    convert(model, report=lines.append)
    assert model[0] is special
    assert type(model[1]) is (rnnfast.RNN if kind is nn.RNN else nn.RNN)
    assert lines[0].startswith("kept 0: ")
    assert reason in lines[0]
    assert lines[1].startswith("swapped 1: ")
    assert len(lines) == 2


class OwnLSTM(nn.LSTM):
    pass


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.RNN(I, H))


A_CELL = "a cell computes one step in a call, and rnnfast's modules a whole sequence"
LEFT = {
    "subclass of LSTM": (lambda: OwnLSTM(I, H), "OwnLSTM is a subclass of nn.LSTM"),
    "RNNBase": (lambda: nn.RNNBase("LSTM", I, H), "RNNBase is no nn.RNN, nn.LSTM or nn.GRU"),
    "RNNCell": (lambda: nn.RNNCell(I, H), A_CELL),
    "LSTMCell": (lambda: nn.LSTMCell(I, H), A_CELL),
    "GRUCell": (lambda: nn.GRUCell(I, H), A_CELL),
    "rnnfast.RNN": (lambda: rnnfast.RNN(I, H), "it is an rnnfast.RNN already"),
    "rnnfast.LSTM": (lambda: rnnfast.LSTM(I, H), "it is an rnnfast.LSTM already"),
    "TorchScript": (scripted, "it is RNN in TorchScript; replace it before torch.jit"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_recurrent_modules_that_stay_are_reported_with_the_reason(kind):
    make, why = LEFT[kind]
    module, lines = make(), []
    model = nn.Sequential(nn.Linear(I, I), module)
    rnnfast.replace(model, report=lines.append)
    assert model[1] is module
    assert lines == [f"kept 1: {why}"]
    assert rnnfast.replace(module, report=lines.append) is module
    assert lines[1:] == [f"kept model: {why}"]


def test_a_model_without_recurrent_modules_is_reported():
    model, lines = nn.Sequential(nn.Linear(I, H)), []
    assert rnnfast.replace(model, report=lines.append) is model
    assert rnnfast.to_torch(model, report=lines.append) is model
    assert lines == [
        "nothing swapped: Sequential holds no nn.RNN, nn.LSTM or nn.GRU",
        "nothing swapped: Sequential holds no rnnfast.RNN, LSTM or GRU",
    ]


@pytest.mark.parametrize("convert", [rnnfast.replace, rnnfast.to_torch])
@pytest.mark.parametrize("given", [nn.RNN, [nn.RNN(I, H)], None], ids=["class", "list", "None"])
def test_other_things_than_modules_are_refused(convert, given):
    with pytest.raises(TypeError, match=r"model: given \w+, wanted a torch\.nn\.Module"):
        convert(given)


# Options


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_replace_takes_options_of_the_new_modules(norm):
    options = {
        "norm": norm,
        "norm_eps": 1e-3,
        "residual": True,
        "track_gradient_flow": True,
        "clip_state_grad": 2.0,
        "bptt_window": 3,
        "backend": "reference",
    }
    old = nn.RNN(I, I, 3, dtype=torch.float64)
    before, state = dict(old.named_parameters()), torch.get_rng_state()
    new = rnnfast.replace(old, report=None, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: getattr(new, name) for name in options} == options
    assert all(getattr(new, name) is p for name, p in before.items())
    alone = rnnfast.RNN(I, I, 3, dtype=torch.float64, **options)
    alone.load_state_dict(before, strict=False)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for rnn in (new, alone):
        y, _ = rnn(x)
        y.square().sum().backward()
        results.append((y.detach(), rnn.gradient_flow.carry_norm))
    for ours, theirs in zip(*results):
        assert_same(ours, theirs)
    assert list(new.state_dict()) == list(alone.state_dict())


def test_options_reach_every_module_and_none_of_rnnfasts_own():
    own = rnnfast.RNN(I, H)
    model, lines = nn.Sequential(nn.RNN(I, H), nn.ModuleList([nn.RNN(H, H)]), own), []
    rnnfast.replace(model, report=lines.append, track_gradient_flow=True)
    assert [model[i].track_gradient_flow for i in (0, 2)] == [True, False]
    assert model[1][0].track_gradient_flow is True
    assert "track_gradient_flow=True" in lines[0]
    assert lines[2] == "kept 2: it is an rnnfast.RNN already, and keeps its own options"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"norm": "group"}, ValueError, "norm: given 'group', wanted one of"),
        ({"bptt_window": 0}, ValueError, "bptt_window: given 0"),
        ({"track_gradient_flow": 1}, ValueError, "track_gradient_flow: given 1"),
        ({"backend": "gpu"}, ValueError, "backend: given 'gpu'"),
        ({"residual": 1}, TypeError, "residual should be of type bool"),
        ({"norm": "layer"}, ValueError, "given 1 unit per head"),
        ({"hiden": 1}, TypeError, "options: given hiden, wanted some of norm, norm_eps"),
        ({"batch_first": True}, TypeError, "options: given batch_first, wanted some of norm"),
        ({"init": "he"}, TypeError, "the weights stay: set rnn.init"),
        ({"num_heads": 2}, TypeError, "the weights stay, and heads have a W_hh of another shape"),
    ],
)
@pytest.mark.parametrize("there", [nn.RNN, nn.Linear])
def test_options_that_cannot_be_are_refused_before_anything_changes(there, options, error, match):
    model = nn.Sequential(nn.RNN(I, H), nn.RNN(I, 1), there(I, H))
    before = list(model)
    with pytest.raises(error, match=match):
        rnnfast.replace(model, **options)
    assert list(model) == before


def test_report_is_printed_unless_told_otherwise(capsys):
    rnnfast.replace(Model())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == (
        "swapped encoder: RNN(4, 5, num_layers=2, bidirectional=True) -> "
        "RNN(4, 5, num_layers=2, bidirectional=True)"
    )
    assert said[1].startswith("swapped rest.list.0: ")
    rnnfast.replace(nn.RNN(I, H))
    assert capsys.readouterr().out.startswith("swapped model: ")
    rnnfast.to_torch(rnnfast.RNN(I, H), report=None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [({"nonlinearity": "sigmoid"}, "nn.RNN has no sigmoid"), ({"residual": True}, "no residual")],
)
def test_to_torch_refuses_what_torch_has_not_and_changes_nothing(options, text):
    model = nn.Sequential(rnnfast.RNN(I, I), nn.Sequential(rnnfast.RNN(I, I, 2, **options)))
    before = list(model.modules())
    with pytest.raises(ValueError, match=f"1.0: .*{text}"):
        rnnfast.to_torch(model)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match=f"model: .*{text}"):
        rnnfast.to_torch(rnnfast.RNN(I, I, 2, **options))


def test_replaced_model_copies_and_pickles():
    model = quiet(Model())
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# torch.nn.RNN set to rnnfast.RNN: the way into a library that makes its own RNN


@pytest.fixture
def patched(monkeypatch):
    """The torch.nn.RNN that was there before."""
    original = nn.RNN
    monkeypatch.setattr(torch.nn, "RNN", rnnfast.RNN)
    return original


def test_replace_leaves_rnnfasts_own_modules_where_torchs_name_is_theirs(patched):
    own = nn.RNN(I, H, clip_state_grad=1.0, bptt_window=3)
    model, said = nn.Sequential(own, patched(I, H)), []
    rnnfast.replace(model, report=said.append)
    assert model[0] is own
    assert type(model[1]) is rnnfast.RNN
    assert [line.split(":")[0] for line in said] == ["kept 0", "swapped 1"]
    assert rnnfast.replace(own, report=None) is own


def test_to_torch_gives_torchs_own_class_where_its_name_is_rnnfasts(patched):
    model = rnnfast.to_torch(nn.Sequential(nn.RNN(I, H), patched(I, H)), report=None)
    assert [type(m) for m in model] == [patched] * 2
    with pytest.raises(ValueError, match=r"0: nn\.RNN has no bptt_window"):
        rnnfast.to_torch(nn.Sequential(nn.RNN(I, H, bptt_window=2)))


def test_probe_and_monitor_know_torchs_rnn_under_another_name(patched):
    x, torchs = torch.randn(T, B, I), patched(I, H)
    found = rnnfast.probe(torchs, x)
    assert torch.equal(found.norm, rnnfast.probe(quiet(torchs), x).norm)
    assert rnnfast.probe(nn.RNN(I, H, nonlinearity="sigmoid"), x).norm.shape == (1, 1, T)
    with pytest.raises(ValueError, match=r"rnnfast\.replace\(model, track_gradient_flow=True\)"):
        rnnfast.GradientMonitor(nn.Sequential(torchs))
