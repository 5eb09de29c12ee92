"""PyTorch's own samples for nn.RNN (those of its test_modules.py), run through rnnfast.RNN."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from twins import assert_same, assert_same_results, results

import rnnfast

with warnings.catch_warnings():  # what the import says is not ours to mend
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_modules

INFO = next(info for info in common_modules.module_db if info.module_cls is nn.RNN)
KIND = next(info.name for info in common_modules.module_db if info is INFO)


def samples(dtype, packed=False):
    torch.manual_seed(0)
    return common_modules.module_inputs_torch_nn_RNN_GRU(
        INFO,
        device="cpu",
        dtype=dtype,
        requires_grad=True,
        training=True,
        with_packed_sequence=packed,
        is_rnn=True,
    )


def error_samples(dtype):
    return common_modules.module_error_inputs_torch_nn_RNN_GRU(
        INFO, device="cpu", dtype=dtype, requires_grad=False, training=True
    )


def pair(sample, backend, dtype):
    construct = sample.constructor_input
    old = nn.RNN(*construct.args, **construct.kwargs, dtype=dtype)
    new = rnnfast.RNN(*construct.args, **construct.kwargs, dtype=dtype, backend=backend)
    new.load_state_dict(old.state_dict())
    return old, new, sample.forward_input.args


def test_the_database_is_the_one_this_was_written_for():
    assert KIND == "nn.RNN"
    assert len(samples(torch.float64)) == 32
    assert len(samples(torch.float64, packed=True)) == 64
    assert len(error_samples(torch.float32)) == 14


@pytest.mark.parametrize("i", range(64))
def test_forward_and_grad(i, backend):
    """test_forward and test_grad, packed samples included."""
    sample = samples(torch.float64, packed=True)[i]
    old, new, args = pair(sample, backend, torch.float64)
    assert_same_results(results(new, *args), results(old, *args))


def test_float32_error_is_no_larger_than_torchs(backend):
    """Pooled over all samples, values and gradients; float64 is the judge."""
    squares, n = {"old": 0.0, "new": 0.0}, 0
    for sample in samples(torch.float32, packed=True):
        old, new, args = pair(sample, backend, torch.float32)
        double = [a.double() if isinstance(a, torch.Tensor) else a.to(torch.float64) for a in args]
        judge = results(copy.deepcopy(old).double(), *double)
        found = {"old": results(old, *args), "new": results(new, *args)}
        for key, wanted in judge.items():
            scale = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            for name in squares:
                error = (found[name][key].double() - wanted) / scale
                squares[name] += float(error.square().sum())
            n += wanted.numel()
    assert n > 2000
    assert 0 < squares["new"] <= 1.25**2 * squares["old"]


@pytest.mark.parametrize("i", range(32))
def test_no_batch_dimension_is_a_batch_of_one(i, backend):
    """The samples' own reference function."""
    sample = samples(torch.float64)[i]
    _, new, args = pair(sample, backend, torch.float64)
    wanted = sample.reference_fn(new, *args)
    for a, b in zip(new(*args), wanted):
        assert_same(a.detach(), b.detach())


@pytest.mark.parametrize("i", range(32))
@pytest.mark.parametrize("order", ["grad", "gradgrad"])
def test_grad_and_gradgrad_by_finite_differences(i, order, backend):
    sample = samples(torch.float64)[i]
    _, new, args = pair(sample, backend, torch.float64)
    if sample.constructor_input.kwargs["nonlinearity"] == "relu":
        new.load_state_dict(far_from_zero(new))
        args = [a.detach().abs().requires_grad_() for a in args]
    names = [name for name, _ in new.named_parameters()]

    def call(*tensors):
        weights = dict(zip(names, tensors[len(args) :]))
        return torch.func.functional_call(new, weights, tensors[: len(args)])

    inputs = (*args, *(p.detach().clone().requires_grad_() for p in new.parameters()))
    check = torch.autograd.gradcheck if order == "grad" else torch.autograd.gradgradcheck
    assert check(call, inputs, fast_mode=True)


def far_from_zero(rnn):
    """Every pre-activation positive: a finite difference across the kink of relu says nothing."""
    return {name: w.abs() + 0.1 for name, w in rnn.state_dict().items()}


@pytest.mark.parametrize("i", range(32))
def test_non_contiguous_tensors(i, backend):
    sample = samples(torch.float64)[i]
    old, new, args = pair(sample, backend, torch.float64)
    spread = [a.detach().repeat_interleave(2, -1)[..., ::2] for a in args]
    assert not all(a.is_contiguous() for a in spread)
    output, h_n = new(*spread)
    wanted, wanted_h_n = old(*args)
    assert_same(output.detach(), wanted.detach())
    assert_same(h_n.detach(), wanted_h_n.detach())
    for a, b in zip(
        torch.autograd.grad((output**2).sum(), list(new.parameters())),
        torch.autograd.grad((wanted**2).sum(), list(old.parameters())),
    ):
        assert_same(a, b)


@pytest.mark.parametrize("i", range(14))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors(i, dtype, backend):
    sample = error_samples(dtype)[i]
    construct = sample.module_error_input.constructor_input
    options = {"backend": backend} | construct.kwargs
    if sample.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(sample.error_type, match=sample.error_regex) as caught:
            rnnfast.RNN(*construct.args, **options)
    else:
        rnn = rnnfast.RNN(*construct.args, **options)
        forward = sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex) as caught:
            rnn(*forward.args, **forward.kwargs)
    assert caught.type is sample.error_type
    assert re.search(sample.error_regex, str(caught.value))
