"""Under one seed the dropout between layers takes out what nn.RNN's takes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import twins

import rnnfast

T, B, I, H = 7, 3, 5, 6  # noqa: E741
LENGTHS = {"packed": [7, 4, 2], "packed in any order": [2, 7, 4]}


def batch(form: str, batch_first: bool, dtype: torch.dtype) -> Tensor | PackedSequence:
    if form == "unbatched":
        return torch.randn(T, I, dtype=dtype)
    x = torch.randn(B, T, I, dtype=dtype) if batch_first else torch.randn(T, B, I, dtype=dtype)
    if form == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if form == "padded":
        return x
    return pack_padded_sequence(x, LENGTHS[form], batch_first, enforce_sorted=form == "packed")


def run(rnn: torch.nn.RNNBase, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n, and the state of the generator that is left."""
    torch.manual_seed(1)
    y, h_n = rnn(x)
    return y.data if isinstance(x, PackedSequence) else y, h_n, torch.get_rng_state()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["padded", "transposed", "unbatched", *LENGTHS])
def test_mask_is_that_of_torch(form, batch_first, backend):
    for bidirectional in (False, True):
        for p in (0.4, 1.0):
            options = {"dropout": p, "batch_first": batch_first, "bidirectional": bidirectional}
            old, new = twins(backend, I, H, 3, dtype=torch.float64, **options)
            x = batch(form, batch_first, torch.float64)
            (y, h_n, after), (old_y, old_h_n, old_after) = run(new, x), run(old, x)
            assert torch.allclose(y, old_y, rtol=0, atol=1e-12)
            assert torch.allclose(h_n, old_h_n, rtol=0, atol=1e-12)
            assert torch.equal(after, old_after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["padded", "packed in any order"])
def test_mask_under_autocast_is_that_of_torch(form, dtype, backend):
    """Another mask would move values by tenths, rounding by hundredths."""
    for batch_first in (False, True):
        options = {"dropout": 0.4, "batch_first": batch_first}
        old, new = twins(backend, I, H, 3, dtype=torch.float32, **options)
        x = batch(form, batch_first, torch.float32)
        with torch.autocast("cpu", dtype):
            (y, _, after), (old_y, _, old_after) = run(new, x), run(old, x)
        assert torch.allclose(y, old_y, rtol=0, atol=0.02)
        assert torch.equal(after, old_after)


@pytest.mark.parametrize("form", LENGTHS)
def test_record_of_samples_leaves_the_mask_of_packed_input(form, own_backend):
    """The record wants the samples in their own order, the mask is drawn in the sorted one."""
    options = {"dropout": 0.4, "dtype": torch.float64}
    old, new = twins(own_backend, I, H, 3, **options)
    recorded = rnnfast.RNN(I, H, 3, track_gradient_flow="sample", backend=own_backend, **options)
    recorded.load_state_dict(old.state_dict())
    x = batch(form, False, torch.float64)
    assert torch.allclose(run(recorded, x)[0], run(old, x)[0], rtol=0, atol=1e-12)
    assert torch.allclose(run(new, x)[0], run(old, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_mask_does_not_depend_on_residual(batch_first, own_backend):
    """Layer 0 puts out tanh(1) and layer 1 the tanh of what it gets: 0 where the mask is 0."""
    rnn = rnnfast.RNN(
        H, H, 2, dropout=0.4, batch_first=batch_first, residual=True, dtype=torch.float64,
        backend=own_backend,
    )  # fmt: skip
    old = torch.nn.RNN(H, H, 2, dropout=0.4, batch_first=batch_first, dtype=torch.float64)
    with torch.no_grad():
        for module in (rnn, old):
            for weight in module.parameters():
                weight.zero_()
            module.bias_ih_l0.fill_(1)
            module.weight_ih_l1.copy_(torch.eye(H))
    x = torch.zeros(B, T, H, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    assert torch.equal(run(rnn, x)[0] == 0, run(old, x)[0] == 0)
    assert 0 < (run(rnn, x)[0] == 0).sum() < x.numel()


def test_gradient_of_packed_input_goes_through_the_mask(own_backend):
    old, new = twins(own_backend, I, H, 2, dropout=0.4, dtype=torch.float64)
    found = []
    for rnn in (old, new):
        leaf = torch.arange(T * B * I, dtype=torch.float64).view(T, B, I).sin().requires_grad_()
        y = run(rnn, pack_padded_sequence(leaf, [2, 7, 4], enforce_sorted=False))[0]
        found.append(torch.autograd.grad(y.sin().sum(), [leaf, rnn.weight_hh_l0]))
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
