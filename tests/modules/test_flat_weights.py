"""_flat_weights, nn.RNNBase's list of the weights, which other code reads and assigns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from twins import assert_same

import rnnfast

T, B, IN, H = 6, 2, 3, 4


def x64(*shape):
    return torch.randn(*(shape or (T, B, IN)), dtype=torch.float64)


def pair(backend, **options):
    old = nn.RNN(IN, H, 2, dtype=torch.float64, **options)
    new = rnnfast.RNN(IN, H, 2, dtype=torch.float64, backend=backend, **options)
    new.load_state_dict(old.state_dict())
    return old, new


def test_the_list_is_that_of_torch(backend):
    old, new = pair(backend, bidirectional=True)
    assert len(new._flat_weights) == len(old._flat_weights) == 16
    assert all(torch.equal(a, b) for a, b in zip(new._flat_weights, old._flat_weights))
    assert isinstance(new._flat_weights, list)


def test_a_list_made_of_the_module_itself_changes_nothing(backend):
    """Some code refreshes nn.RNN's list so."""
    _, new = pair(backend)
    before, x = dict(new.named_parameters()), x64()
    wanted = new(x)[0]
    new._flat_weights = [getattr(new, name) for name in new._flat_weights_names]
    new._flat_weights = None
    new._flat_weights[1] = new.weight_hh_l0
    new._init_flat_weights()
    assert all(p is before[name] for name, p in new.named_parameters())
    assert torch.equal(new(x)[0], wanted)


def test_recurrent_dropout_by_the_list(backend):
    """For one call other tensors, made of the parameters, which get the gradient."""
    found = []
    for rnn in pair(backend):
        kept, x = rnn._flat_weights, torch.ones(T, B, IN, dtype=torch.float64)
        torch.manual_seed(3)
        rnn._flat_weights = [
            F.dropout(w, 0.5) if name.startswith("weight_hh") else w
            for name, w in zip(rnn._flat_weights_names, kept)
        ]
        rnn(x)[0].sum().backward()
        rnn._flat_weights = kept
        assert all(isinstance(p, nn.Parameter) for p in rnn.parameters())
        found.append([rnn(x)[0], *(p.grad for p in rnn.parameters())])
        copy.deepcopy(rnn)
    for old, new in zip(*found, strict=True):
        assert_same(new, old)


def test_one_weight_set_in_the_list_is_computed_with(backend):
    """As weight drop does, beside the module's dictionary or without it."""
    x, w = x64(), x64(H, H)
    outputs = []
    for rnn in pair(backend):
        rnn._flat_weights[1] = nn.Parameter(w)
        outputs.append(rnn(x)[0])
    assert_same(outputs[1], outputs[0])


def test_an_item_of_an_old_list_leaves_the_other_weights(backend):
    _, new = pair(backend)
    old = new._flat_weights
    new.weight_ih_l0 = nn.Parameter(x64(H, IN))
    ih, hh = new.weight_ih_l0, nn.Parameter(x64(H, H))
    old[1] = hh
    assert new.weight_ih_l0 is ih
    assert new.weight_hh_l0 is hh
    old[:2] = [hh, ih]
    assert new.weight_ih_l0 is hh


def test_a_parametrized_weight_stays_what_its_parametrization_computes():
    rnn = parametrizations.weight_norm(rnnfast.RNN(IN, H), "weight_hh_l0")
    before = {name: p.clone() for name, p in rnn.named_parameters()}
    rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
    with pytest.raises(TypeError, match="given another weight_hh_l0, wanted the one that its par"):
        rnn._flat_weights[1] = torch.eye(H)
    assert all(torch.equal(p, before[name]) for name, p in rnn.named_parameters())


def test_a_list_that_cannot_be_is_refused():
    rnn = rnnfast.RNN(IN, H)
    with pytest.raises(ValueError, match=r"_flat_weights: given 1, wanted 4: \['weight_ih_l0'"):
        rnn._flat_weights = [rnn.weight_ih_l0]
    with pytest.raises(TypeError, match="_flat_weights: given float for weight_ih_l0"):
        rnn._flat_weights = [1.0] * 4
    rnn._flat_weights = [x64(2, 2)] * 4
    with pytest.raises((RuntimeError, ValueError)):
        rnn(torch.randn(T, B, IN))
