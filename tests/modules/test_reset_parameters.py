"""reset_parameters: new values for what is the RNN's own, and for nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast

T, B, IN, H = 6, 3, 4, 6


class Scaled(rnnfast.RNN):
    """With a parameter and a buffer of its own, and a module."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("scale", torch.full((5,), 2.0))
        self.weight = nn.Parameter(torch.full((3,), 7.0))
        self.norm_weight_of_mine = nn.Parameter(torch.full((3,), 7.0))
        self.head = nn.BatchNorm1d(H)


class Times(nn.Module):
    """A parametrization with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("count", torch.tensor(4))

    def forward(self, x):
        return self.factor * x


def pruned(rnn):
    prune.random_unstructured(rnn, "weight_hh_l0", 0.5)
    return rnn


def legacy(norm):
    def apply(rnn):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(rnn, "weight_hh_l0")

    return apply


def times(rnn):
    parametrize.register_parametrization(rnn, "weight_hh_l0", Times())
    return rnn


COMPUTED = {
    "pruned": (pruned, {"weight_hh_l0_mask"}),
    "spectral_norm": (
        lambda rnn: parametrizations.spectral_norm(rnn, "weight_hh_l0"),
        {"parametrizations.weight_hh_l0.0._u", "parametrizations.weight_hh_l0.0._v"},
    ),
    "weight_norm": (lambda rnn: parametrizations.weight_norm(rnn, "weight_hh_l0"), set()),
    "legacy spectral_norm": (legacy(nn.utils.spectral_norm), {"weight_hh_l0_u", "weight_hh_l0_v"}),
    "legacy weight_norm": (legacy(nn.utils.weight_norm), set()),
    "of its own": (
        times,
        {"parametrizations.weight_hh_l0.0.factor", "parametrizations.weight_hh_l0.0.count"},
    ),
}


@pytest.mark.parametrize("init", ["torch", "orthogonal", "he"])
@pytest.mark.parametrize("case", COMPUTED)
def test_a_computed_weight_is_drawn_and_keeps_what_computes_it(case, init):
    compute, kept = COMPUTED[case]
    rnn = compute(rnnfast.RNN(IN, H, init=init))
    before = {name: x.clone() for name, x in rnn.state_dict().items()}
    torch.manual_seed(9)
    rnn.reset_parameters()
    after = rnn.state_dict()
    assert kept <= after.keys()
    biases = {"bias_ih_l0", "bias_hh_l0"} if init != "torch" else set()
    for name, x in after.items():
        assert torch.equal(x, before[name]) == (name in kept | biases), name
    y = rnn(torch.randn(T, B, IN))[0]
    y.sum().backward()
    assert y.isfinite().all()
    assert (rnn.weight_hh_l0 != 0).any(1).all()


@pytest.mark.parametrize("case", [case for case in COMPUTED if case != "of its own"])
def test_computed_weights_are_drawn_as_torchs(case):
    """nn.RNN draws all parameters there are, in their order."""
    found = []
    for kind in (nn.RNN, rnnfast.RNN):
        torch.manual_seed(3)
        rnn = COMPUTED[case][0](kind(IN, H))
        torch.manual_seed(9)
        rnn.reset_parameters()
        found.append(list(rnn.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_what_a_subclass_has_beside_stays(norm):
    rnn = Scaled(IN, H, norm=norm)
    rnn.head.running_mean.fill_(5)
    before = {name: x.clone() for name, x in rnn.state_dict().items()}
    rnn(torch.randn(T, B, IN))
    torch.manual_seed(9)
    rnn.reset_parameters()
    for name, x in rnn.state_dict().items():
        own = name.startswith(("weight_", "bias_"))
        assert torch.equal(x, before[name]) != own, name


def test_an_orthogonal_parametrization_stays_orthogonal():
    rnn = parametrizations.orthogonal(rnnfast.RNN(IN, H, dtype=torch.float64), "weight_hh_l0")
    before = rnn.weight_hh_l0.detach().clone()
    rnn.reset_parameters()
    w = rnn.weight_hh_l0
    torch.testing.assert_close(w @ w.T, torch.eye(H, dtype=torch.float64))
    assert not torch.allclose(w, before)


def test_tied_weights_stay_tied():
    rnn = rnnfast.RNN(IN, H, bidirectional=True)
    rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    before = rnn.weight_hh_l0.detach().clone()
    rnn.reset_parameters()
    assert rnn.weight_hh_l0_reverse is rnn.weight_hh_l0
    assert not torch.equal(rnn.weight_hh_l0, before)
