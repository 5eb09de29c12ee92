"""Arguments of rnnfast.RNN that are set on a module that exists: checked then, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rnnfast

T, B, IN, H = 6, 3, 4, 6

WRONG = [
    ("clip_state_grad", -1.0, ValueError, "clip_state_grad: given -1.0, wanted a number above 0"),
    ("clip_state_grad", 0, ValueError, "clip_state_grad: given 0, wanted a number above 0"),
    ("clip_state_grad", 1e-31, ValueError, "clip_state_grad: given 1e-31, wanted 1e-30 or more"),
    ("clip_state_grad", float("nan"), ValueError, "clip_state_grad: given nan"),
    ("clip_state_grad", "1", TypeError, "clip_state_grad: given '1', wanted a float"),
    ("clip_state_grad", torch.tensor(1.0), TypeError, r"clip_state_grad: given tensor\(1.\)"),
    ("bptt_window", 0, ValueError, "bptt_window: given 0, wanted 1 or more"),
    ("bptt_window", 2.0, TypeError, "bptt_window: given 2.0, wanted an int"),
    ("bptt_window", True, TypeError, "bptt_window: given True, wanted an int"),
    ("norm_eps", 0.0, ValueError, "norm_eps: given 0.0, wanted a number above 0"),
    ("norm_eps", None, TypeError, "norm_eps: given None, wanted a float"),
    ("backend", "gpu", ValueError, r"backend: given 'gpu', wanted one of \['auto', 'cpu'"),
    ("backend", None, ValueError, "backend: given None, wanted one of"),
    ("track_gradient_flow", "samples", ValueError, "track_gradient_flow: given 'samples', wanted"),
    ("track_gradient_flow", 1, ValueError, "track_gradient_flow: given 1, wanted one of"),
    ("init", "xavier", ValueError, "init: given 'xavier', wanted one of"),
    ("residual", 1, TypeError, "residual should be of type bool, got: int"),
    ("batch_first", "yes", TypeError, "batch_first should be of type bool, got: str"),
    ("nonlinearity", "gelu", ValueError, "Unknown nonlinearity 'gelu'. Select from 'tanh'"),
    ("mode", "LSTM", ValueError, "mode: given 'LSTM', wanted one of .'RNN_TANH'"),
    ("dropout", 1.5, ValueError, r"dropout: given 1.5, wanted a number in range \[0, 1\]"),
    ("dropout", -0.1, ValueError, "dropout: given -0.1"),
    ("dropout", float("nan"), ValueError, "dropout: given nan"),
    ("dropout", True, ValueError, "dropout: given True"),
    ("dropout", None, ValueError, "dropout: given None"),
    ("num_heads", 3, ValueError, "num_heads: given 3, wanted 2, which the parameters were made"),
    ("norm", None, ValueError, "norm: given None, wanted 'layer', which the parameters"),
    ("norm", "batch", ValueError, "norm: given 'batch', wanted 'layer'"),
    ("num_layers", 1, ValueError, "num_layers: given 1, wanted 2, which the parameters"),
    ("bidirectional", False, ValueError, "bidirectional: given False, wanted True, which"),
    ("bias", False, ValueError, "bias: given False, wanted True, which the parameters"),
    ("proj_size", 2, ValueError, "proj_size: given 2, wanted 0, which the parameters"),
    ("hidden_size", 8, ValueError, "hidden_size: given 8, wanted 6"),
    ("hidden_size", 6.0, ValueError, "hidden_size: given 6.0, wanted 6"),
    ("input_size", 6, ValueError, "input_size: given 6, wanted 4"),
]


def make(**options) -> rnnfast.RNN:
    given = {"bidirectional": True, "norm": "layer", "num_heads": 2} | options
    return rnnfast.RNN(IN, H, 2, **given)


@pytest.mark.parametrize(("name", "value", "kind", "match"), WRONG)
def test_a_wrong_value_is_refused_when_it_is_set(name, value, kind, match):
    """The module stays as it was, and so do its copies."""
    rnn = make()
    for module in (rnn, copy.deepcopy(rnn), rnn._replicate_for_data_parallel()):
        before = getattr(module, name), str(module)
        with pytest.raises(kind, match=match):
            setattr(module, name, value)
        assert (getattr(module, name), str(module)) == before


LATER = {
    "clip_state_grad": 0.5,
    "bptt_window": 2,
    "norm_eps": 0.1,
    "nonlinearity": "relu",
    "residual": True,
    "batch_first": True,
    "backend": "reference",
    "init": "orthogonal",
}


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", LATER)
def test_what_is_set_later_is_as_if_it_had_been_constructed(name, norm):
    options = {"norm": norm, "input_size": 12, "hidden_size": 6}
    plain = rnnfast.RNN(num_layers=2, bidirectional=True, **options)
    made = rnnfast.RNN(num_layers=2, bidirectional=True, **options, **{name: LATER[name]})
    if name != "init":
        made.load_state_dict(plain.state_dict())
    setattr(plain, name, LATER[name])
    assert plain.mode == made.mode
    assert str(plain).splitlines()[0] == str(made).splitlines()[0]
    found = []
    for rnn in (plain, made):
        if name == "init":
            torch.manual_seed(3)
            rnn.reset_parameters()
        x = torch.randn(T, B, 12, generator=torch.Generator().manual_seed(1))
        rnn(x)[0].square().sum().backward()
        found.append([p.grad for p in rnn.parameters()])
    assert all(map(torch.equal, *found))


def test_the_mode_and_the_nonlinearity_follow_each_other():
    rnn = rnnfast.RNN(IN, H)
    for nonlinearity in ("relu", "sigmoid", "tanh"):
        rnn.nonlinearity = nonlinearity
        assert rnn.mode == f"RNN_{nonlinearity.upper()}"
    rnn.mode = "RNN_RELU"  # as nn.RNN takes it
    assert rnn.nonlinearity == "relu"
    old = nn.RNN(IN, H)
    old.load_state_dict(rnn.state_dict())
    old.mode = "RNN_RELU"
    x = torch.randn(T, B, IN)
    torch.testing.assert_close(rnn(x)[0], old(x)[0])


def test_a_value_that_stays_may_be_set():
    rnn = make()
    for name in ("num_heads", "norm", "num_layers", "bidirectional", "bias", "input_size"):
        setattr(rnn, name, getattr(rnn, name))
    rnn.hidden_size = H


def test_sizes_follow_weights_that_were_exchanged():
    """As after a fine-tuning on more features, or after units were taken out."""
    rnn, old = rnnfast.RNN(IN, H), nn.RNN(IN, H)
    for module in (rnn, old):
        torch.manual_seed(5)
        for name, shape in (
            ("weight_ih_l0", (4, 7)),
            ("weight_hh_l0", (4, 4)),
            ("bias_ih_l0", (4,)),
            ("bias_hh_l0", (4,)),
        ):
            setattr(module, name, nn.Parameter(torch.randn(shape)))
        module.input_size, module.hidden_size = 7, 4
    with pytest.raises(ValueError, match="hidden_size: given 6, wanted 4 as weight_ih_l0 has it"):
        rnn.hidden_size = H
    x, hx = torch.randn(T, B, 7), torch.randn(1, B, 4)
    torch.testing.assert_close(rnn(x, hx)[0], old(x, hx)[0])


def test_a_residual_that_adds_nothing_warns_when_it_is_set():
    rnn = rnnfast.RNN(IN, H)
    with pytest.warns(UserWarning, match="residual=True adds nothing with num_layers=1") as caught:
        rnn.residual = True
    assert caught[0].filename == __file__


# torch 2.13 warns of what it does itself as it traces.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")
def test_an_option_set_between_calls_is_seen_by_a_compiled_module():
    rnn = rnnfast.RNN(IN, H)
    x = torch.randn(T, B, IN)
    compiled = torch.compile(rnn, backend="eager")
    compiled(x)
    rnn.nonlinearity = "relu"
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], rnn(x)[0])


def test_a_record_begins_again_where_it_is_to_be_of_other_rows():
    rnn = rnnfast.RNN(IN, H, track_gradient_flow=True)
    for tracking, shape in (("sample", (1, 1, T, B)), (True, (1, 1, T))):
        rnn.track_gradient_flow = tracking
        assert not hasattr(rnn, "gradient_flow")
        rnn(torch.randn(T, B, IN))[0].sum().backward()
        assert rnn.gradient_flow.gain.shape == shape
