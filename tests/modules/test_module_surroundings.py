"""The modules among PyTorch's other tools: devices and dtypes, parametrizations, autocast."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import GATES, assert_same, assert_same_results, mapped, results, start, tensors, twins

import rnnfast

T, B, I, H = 6, 2, 3, 4  # noqa: E741


def x64(*shape):
    return torch.randn(*(shape or (T, B, I)), dtype=torch.float64)


# Devices and dtypes


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16"])
def test_cast_module_computes_in_its_new_dtype(cast, backend, kind):
    rnn = getattr(getattr(rnnfast, kind)(I, H, 2, backend=backend), cast)()
    dtype = rnn.weight_hh_l0.dtype
    output, h_n = rnn(torch.randn(T, B, I, dtype=dtype))
    output.sum().backward()
    for value in (output, *tensors(h_n), rnn.weight_hh_l0.grad):
        assert value.dtype == dtype
    with pytest.raises(ValueError, match="does not match weight dtype"):
        rnn(torch.randn(T, B, I))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_larger_than_torchs(dtype, backend, kind):
    """Pooled over seeds; judged by float64 on the same rounded numbers. Ours rounds less often."""
    squares = {"old": 0.0, "new": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        old, new = twins(backend, 8, 16, 2, dtype=dtype, kind=kind)
        x = torch.randn(20, 3, 8, dtype=dtype)
        judge = results(copy.deepcopy(old).double(), x.double())
        for name, rnn in (("old", old), ("new", new)):
            for key, value in results(rnn, x).items():
                scale = judge[key].norm()
                squares[name] += float((value.double() - judge[key]).norm() / scale) ** 2
    assert 0 < squares["new"] <= 1.25**2 * squares["old"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
def test_meta_device_gives_shapes(batch_first, name, kind):
    options = {"num_layers": 2, "batch_first": batch_first, "bidirectional": True, "device": "meta"}
    old = getattr(nn, kind)(I, H, **options)
    new = getattr(rnnfast, kind)(I, H, backend=name, **options)
    x = torch.zeros(T, B, I, device="meta")
    hx = start(kind, torch.zeros(4, B if not batch_first else T, H, device="meta"))
    for given in (None, hx):
        (output, h_n), (wanted, wanted_h_n) = new(x, given), old(x, given)
        for a, b in zip((output, *tensors(h_n)), (wanted, *tensors(wanted_h_n))):
            assert a.shape == b.shape
            assert a.device.type == "meta"
    with pytest.raises(RuntimeError, match=r"size|hidden"):
        new(x, start(kind, torch.zeros(4, 99, H, device="meta")))
    new(x)[0].sum().backward()
    assert new.weight_hh_l0.grad.shape == (GATES[kind] * H, H)


def test_to_empty_and_load(backend, kind):
    old, _ = twins(backend, I, H, 2, kind=kind)
    new = getattr(rnnfast, kind)(I, H, 2, device="meta", dtype=torch.float64, backend=backend)
    new = new.to_empty(device="cpu")
    new.load_state_dict(old.state_dict())
    x = x64()
    assert_same_results(results(new, x), results(old, x))


def test_skip_init_draws_nothing(backend, kind):
    """nn.RNN has no device in its signature and refuses."""
    state = torch.get_rng_state()
    rnn = nn.utils.skip_init(getattr(rnnfast, kind), I, H, 2, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert rnn.weight_hh_l0.device.type == "cpu"
    rnn.reset_parameters()
    assert rnn(torch.randn(T, B, I))[0].isfinite().all()


# Weights that are computed


def spectral(rnn):
    return parametrizations.spectral_norm(rnn, "weight_hh_l0")


def weight_norm(rnn):
    return parametrizations.weight_norm(rnn, "weight_hh_l0")


def orthogonal(rnn):
    return parametrizations.orthogonal(rnn, "weight_hh_l0")


@pytest.mark.parametrize("make", [weight_norm, orthogonal, spectral])
def test_parametrized_weight(make, backend, kind):
    """Values, gradients, an optimizer step that is seen, a copy after use, and the way back."""
    old, new = twins(backend, I, H, kind=kind)
    for rnn in (old, new):
        torch.manual_seed(1)
        make(rnn).eval()  # spectral_norm changes at each look in train mode
    assert parametrize.is_parametrized(new, "weight_hh_l0")
    x = x64()
    assert_same_results(results(new, x), results(old, x))
    before = new(x)[0]
    before.sum().backward()
    assert all((p.grad != 0).any() for p in new.parameters() if p.grad is not None)
    torch.optim.SGD(new.parameters(), lr=0.1).step()
    after = new(x)[0]
    assert not torch.equal(after, before)
    twin = copy.deepcopy(new)
    assert torch.equal(twin(x)[0], after)
    parametrize.remove_parametrizations(new, "weight_hh_l0")
    assert type(new) is getattr(rnnfast, kind)
    assert sorted(dict(new.named_parameters())) == sorted(new._flat_weights_names)
    assert_same(new(x)[0], after)


def test_orthogonal_weight_trains_in_train_mode(backend, kind):
    rnn = orthogonal(getattr(rnnfast, kind)(I, H, dtype=torch.float64, backend=backend))
    step = torch.optim.SGD(rnn.parameters(), lr=0.5)
    x = x64()
    for _ in range(3):
        step.zero_grad()
        rnn(x)[0].sum().backward()
        step.step()
    w = rnn.weight_hh_l0.detach()
    assert_same(w.T @ w, torch.eye(H).double())  # gates below one another: columns alone


def test_legacy_weight_norm(backend, kind):
    old, new = twins(backend, I, H, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for rnn in (old, new):
            nn.utils.weight_norm(rnn, "weight_hh_l0")
    with torch.no_grad():
        for rnn in (old, new):
            rnn.weight_hh_l0_g.mul_(2)
    x = x64()
    assert_same_results(results(new, x), results(old, x))
    nn.utils.remove_weight_norm(new, "weight_hh_l0")
    assert_same(new(x)[0], old(x)[0])


def test_pruned_weight(backend, kind):
    old, new = twins(backend, I, H, kind=kind)
    for rnn in (old, new):
        prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5)
    x = x64()
    assert int((new.weight_hh_l0 == 0).sum()) == GATES[kind] * H * H // 2
    found = results(new, x)
    assert_same_results(found, results(old, x))
    assert int((found["d weight_hh_l0_orig"] == 0).sum()) >= GATES[kind] * H * H // 2
    assert_same(new(x)[0], old(x)[0])  # once more: nn.RNN looks at a list it keeps
    prune.remove(new, "weight_hh_l0")
    assert_same(new(x)[0], found["output"])


def test_tied_weights(backend, kind):
    old, new = twins(backend, I, H, bidirectional=True, kind=kind)
    for rnn in (old, new):
        rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    x = x64()
    assert "weight_hh_l0_reverse" not in dict(new.named_parameters())
    assert_same_results(results(new, x), results(old, x))
    copied = copy.deepcopy(new)
    assert copied.weight_hh_l0_reverse is copied.weight_hh_l0


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_dtypes_are_torchs(dtype, given, bidirectional, backend, kind):
    x = torch.randn(T, B, I, dtype=given)
    hx = start(kind, torch.randn(4 if bidirectional else 2, B, H))
    options = {"num_layers": 2, "bidirectional": bidirectional, "dtype": torch.float32}
    old, new = twins(backend, I, H, **options, kind=kind)
    # On a CPU nn.GRU returns float32, and nn.LSTM cannot train in float16.
    modules = [old, new] if kind == "RNN" else [] if backend == "torch" else [new]
    for rnn in modules:
        for state in (None, hx, mapped(lambda h: h.to(dtype), hx)):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype):
                output, h_n = rnn(leaf, state)
            assert all(value.dtype == dtype for value in (output, *tensors(h_n)))
            rnn.zero_grad()
            output.float().sum().backward()
            assert leaf.grad.dtype == given
            assert all(p.grad.dtype == torch.float32 for p in rnn.parameters())


def test_autocast_error_is_no_larger_than_torchs(backend, kind):
    squares = {"old": 0.0, "new": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        old, new = twins(backend, 8, 16, 2, dtype=torch.float32, kind=kind)
        x = torch.randn(20, 3, 8)
        judge = results(copy.deepcopy(old).double(), x.double())
        for name, rnn in (("old", old), ("new", new)):
            with torch.autocast("cpu", torch.bfloat16):
                found = results(rnn, x)
            for key, value in found.items():
                error = (value.double() - judge[key]).norm() / judge[key].norm()
                squares[name] += float(error) ** 2
    assert 0 < squares["new"] <= 1.25**2 * squares["old"]


def test_autocast_leaves_float64_alone(backend, kind):
    old, new = twins(backend, I, H, kind=kind)
    x = x64()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_results(results(new, x), results(old, x))


def test_autocast_off_inside_on(backend, kind):
    _, new = twins(backend, I, H, dtype=torch.float32, kind=kind)
    x = torch.randn(T, B, I)
    wanted = new(x)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(new(x)[0], wanted)


def test_autocast_with_lengths_and_packed_input(backend, kind):
    _, new = twins(backend, I, H, 2, dtype=torch.float32, kind=kind)
    x = torch.randn(T, B, I)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = new(packed)
        other, other_h_n = new(x, lengths=[T, 2])
        nothing, _ = new(x, lengths=[0, 0])
    if kind != "RNN" and backend == "torch":
        return  # some results are float32, as those of torch's modules on a CPU
    for value in (output.data, other, nothing, *tensors(h_n), *tensors(other_h_n)):
        assert value.dtype == torch.bfloat16
    unpacked = nn.utils.rnn.pad_packed_sequence(output)[0]
    assert torch.equal(unpacked, other)
    assert all(map(torch.equal, tensors(h_n), tensors(other_h_n)))


def test_grad_scaler_on_the_cpu(backend, kind):
    """Scaled by a power of two and back, float32 gradients have the same bits."""
    _, new = twins(backend, I, H, dtype=torch.float32, kind=kind)
    x = torch.randn(T, B, I)
    new(x)[0].sum().backward()
    wanted = [p.grad.clone() for p in new.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = torch.optim.SGD(new.parameters(), lr=0.1)
    step.zero_grad()
    scaler.scale(new(x)[0].sum()).backward()
    scaler.unscale_(step)
    for p, g in zip(new.parameters(), wanted):
        assert torch.equal(p.grad, g)
    before = new.weight_hh_l0.detach().clone()
    scaler.step(step)
    scaler.update()
    assert not torch.equal(new.weight_hh_l0, before)


def test_training_follows_torch_step_by_step(backend, kind):
    """The same optimizer on twins: equal losses to rounding over 20 steps."""
    losses = []
    x, target = x64(), x64(T, B, H).tanh()
    for rnn in twins(backend, I, H, 2, kind=kind):
        step = torch.optim.Adam(rnn.parameters(), lr=0.01)
        curve = []
        for _ in range(20):
            step.zero_grad()
            loss = (rnn(x)[0] - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(rnn.parameters(), 1.0)
            step.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    assert_same(losses[1], losses[0])
    assert losses[1][-1] < losses[1][0]
