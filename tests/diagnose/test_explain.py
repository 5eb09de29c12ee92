"""rnnfast.explain of a whole model, of torch's own modules, and of what is neither."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import rnnfast
from rnnfast import watch as calls

T, B, I, H = 6, 3, 4, 5  # noqa: E741
X = torch.zeros(T, B, I)


class OwnLSTM(nn.LSTM):
    pass


class Net(nn.Module):
    """One module of every kind, and one that forward does not call."""

    def __init__(self):
        super().__init__()
        self.ours = rnnfast.RNN(I, H, nonlinearity="sigmoid", batch_first=True)
        self.norm = nn.BatchNorm1d(H)
        self.drop = nn.Dropout(0.5)
        self.theirs = nn.RNN(H, H)
        self.own = OwnLSTM(H, H)
        self.cell = nn.RNNCell(H, H)
        self.idle = nn.RNN(H, H)

    def forward(self, x, scale=1.0, packed=False):
        y = self.ours(x)[0] * scale
        y = self.drop(self.norm(y.transpose(1, 2)).transpose(1, 2)).transpose(0, 1)
        y = self.theirs(pack_sequence(list(y.unbind(1))))[0] if packed else self.theirs(y)[0]
        return y


def sections(text):
    """The lines below each heading."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.startswith(" "):
            found[name].append(line[2:])
        else:
            name = line.partition(":")[0]
            found[name] = [line]
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_explain_takes_a_whole_model(packed):
    model = Net()
    model.drop.eval()
    before = [module.training for module in model.modules()]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    random, x = torch.get_rng_state(), torch.randn(B, T, I)
    torch.set_rng_state(random)
    found = sections(rnnfast.explain(model, x, scale=2.0, packed=packed))
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(found) == ["ours", "theirs", "own", "cell", "idle"]
    assert found["ours"][1:] == rnnfast.explain(model.ours, x).splitlines()
    assert found["ours"][1].endswith("for sigmoid in torch.float32 on cpu")
    theirs = rnnfast.explain(model.theirs, torch.zeros(T, B, H)).splitlines()
    assert found["theirs"][1:] == theirs
    assert found["own"][1:] == [
        "torch's own kernels compute OwnLSTM: OwnLSTM is a subclass of nn.LSTM"
    ]
    assert found["cell"][1].startswith("torch's own kernels compute RNNCell: a cell computes one")
    assert found["idle"] == ["idle: RNN(5, 5), which this call does not reach"]


@pytest.mark.parametrize(("kind", "cell"), [(nn.RNN, "tanh"), (nn.LSTM, "lstm"), (nn.GRU, "gru")])
def test_explain_of_torchs_module_says_what_replace_would_give(kind, cell):
    module, x = kind(I, H, dtype=torch.float64), torch.zeros(T, B, I).double()
    said = rnnfast.explain(module, x).splitlines()
    name = f"nn.{kind.__name__}"
    assert said[0] == f"torch's own kernels compute {name}; after rnnfast.replace(model):"
    replaced = rnnfast.explain(rnnfast.replace(module, report=None), x).splitlines()
    assert [line[2:] for line in said[1:]] == replaced
    assert f"for {cell} in torch.float64" in replaced[0]


def test_explain_of_a_module_that_replace_keeps_says_why():
    pruned = prune.l1_unstructured(nn.RNN(I, H), "weight_hh_l0", 0.5)
    x = torch.zeros(T, B, I)
    assert "pruning, weight_norm or the like changed" in rnnfast.explain(pruned, x)
    assert rnnfast.explain(OwnLSTM(I, H), x) == (
        "torch's own kernels compute OwnLSTM: OwnLSTM is a subclass of nn.LSTM"
    )


def test_explain_of_a_model_without_recurrent_modules_says_so():
    def fails(*_):
        raise AssertionError("it was called")

    model = nn.Sequential(nn.Linear(I, H))
    model.register_forward_pre_hook(fails)
    assert rnnfast.explain(model, torch.zeros(B, I)) == "Sequential holds no recurrent module"


def test_a_module_that_is_called_twice_is_explained_for_each_kind_of_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnnfast.RNN(I, I, dtype=torch.bfloat16)

        def forward(self, x):
            for _ in range(3):
                x = self.rnn(x)[0]
            with torch.autocast("cpu", torch.float16):
                return self.rnn(x)

    said = rnnfast.explain(Twice(), torch.zeros(T, B, I, dtype=torch.bfloat16))
    assert [line.split()[-3] for line in said.splitlines() if "(auto)" in line] == [
        "torch.bfloat16",
        "torch.float16",
    ]


def test_explain_heeds_what_a_call_asks_for():
    rnn, x = rnnfast.RNN(I, H), torch.zeros(T, B, I)
    reset = torch.zeros(T, B, dtype=torch.bool)
    assert "torch's kernels have no reset" in rnnfast.explain(rnn, x, reset=reset)
    assert "no reset" not in rnnfast.explain(rnn, input=x)


def test_a_subclass_with_a_forward_of_its_own_is_explained_for_its_first_argument():
    class Flat(rnnfast.RNN):
        def forward(self, x, scale):
            return super().forward(x.unflatten(1, (B, I)) * scale)

    rnn, x = Flat(I, H), torch.zeros(T, B * I)
    assert rnnfast.explain(rnn, x, scale=2.0).split()[1] == "(auto),"
    assert rnnfast.explain(rnn, x=x, scale=2.0) == rnnfast.explain(rnn, x, 2.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # in torch.compile itself
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_explain_looks_into_wrappers(wrap):
    x = torch.zeros(B, T, I)
    model = Net()
    wrapped = sections(rnnfast.explain(wrap(model), x))
    assert [name.removeprefix("module.") for name in wrapped] == list(
        sections(rnnfast.explain(model, x))
    )
    rnn = rnnfast.RNN(I, H)
    assert rnnfast.explain(rnn, x).splitlines()[0] in rnnfast.explain(wrap(rnn), x)


def test_each_part_is_seen_in_its_own_mode_and_called_in_eval_mode():
    model, modes = nn.Sequential(nn.Linear(I, I), nn.Dropout(0.5), nn.Linear(I, I)), []
    model[0].eval()
    model[2].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    parts = {"first": model[0], "last": model[2]}

    def see(name, part, args, named):
        modes.append((name, part.training, args[0].shape, named))

    calls.watch(model, parts, see, (torch.ones(B, I),), {})
    shape = (B, I)
    assert modes == [("first", False, shape, {}), False, ("last", True, shape, {})]
    assert [module.training for module in model] == [False, True, True]


def test_explain_raises_what_the_model_raises_and_leaves_it_as_it_was():
    model = Net()
    with pytest.raises(RuntimeError, match="features"):
        rnnfast.explain(model, torch.zeros(B, T, I + 1))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "args", "named", "error", "match"),
    [
        (nn.RNN, (X,), {}, TypeError, r"model: given type, wanted a torch\.nn\.Module"),
        (rnnfast.RNN(I, H), (), {}, TypeError, "missing a required argument: 'input'"),
        (nn.RNN(I, H), ([1.0],), {}, TypeError, "input: given list, wanted a tensor or a Packed"),
        (nn.RNN(I, H), (X,), {"lenghts": [1]}, TypeError, "unexpected keyword argument 'lenghts'"),
        (rnnfast.RNN(I, H), (X[0, 0],), {}, ValueError, "input: given 1 axes, wanted"),
        (rnnfast.RNN(I + 1, H), (X,), {}, RuntimeError, "input: given 4 features, wanted 5"),
    ],
)
def test_explain_names_what_is_wrong(model, args, named, error, match):
    with pytest.raises(error, match=match):
        rnnfast.explain(model, *args, **named)
