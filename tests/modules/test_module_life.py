"""The life of a module in a program: weights changed and copied, hooks, modes, autocast."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import GATES, assert_same, assert_same_results, leaf, results, start, tensors, twins

import rnnfast

T, B, I, H = 6, 2, 3, 4  # noqa: E741


def x64(*shape):
    return torch.randn(*(shape or (T, B, I)), dtype=torch.float64)


# Every way of changing a weight is seen


def functional(rnn, w):
    def call(x):
        return torch.func.functional_call(rnn, {"weight_hh_l0": w}, (x,))

    return call


def in_place(rnn, w):
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(w)


def data(rnn, w):
    rnn.weight_hh_l0.data = w


def data_in_place(rnn, w):
    rnn.weight_hh_l0.data.copy_(w)


def set_(rnn, w):
    with torch.no_grad():
        rnn.weight_hh_l0.set_(w)


def new_parameter(rnn, w):
    rnn.weight_hh_l0 = nn.Parameter(w)


def in_the_dictionary(rnn, w):
    rnn._parameters["weight_hh_l0"] = nn.Parameter(w)


def deleted_and_registered(rnn, w):
    del rnn.weight_hh_l0
    rnn.register_parameter("weight_hh_l0", nn.Parameter(w))


def load(rnn, w):
    rnn.load_state_dict(rnn.state_dict() | {"weight_hh_l0": w})


def load_assigned(rnn, w):
    rnn.load_state_dict(rnn.state_dict() | {"weight_hh_l0": w}, assign=True)


def optimizer(rnn, w):
    rnn.weight_hh_l0.grad = (rnn.weight_hh_l0 - w).detach()
    torch.optim.SGD(rnn.parameters(), lr=1.0, foreach=True).step()
    with torch.no_grad():
        w.copy_(rnn.weight_hh_l0)


def there_and_back(rnn, w):
    rnn.to(torch.float32).to(torch.float64)
    in_place(rnn, w)


def swapped(rnn, w):
    torch.utils.swap_tensors(rnn.weight_hh_l0, nn.Parameter(w))


def vector(rnn, w):
    state = {name: p.detach() for name, p in rnn.named_parameters()} | {"weight_hh_l0": w}
    flat = torch.cat([x.flatten() for x in state.values()])
    torch.nn.utils.vector_to_parameters(flat, rnn.parameters())


WAYS = [
    functional,
    in_place,
    data,
    data_in_place,
    set_,
    new_parameter,
    in_the_dictionary,
    deleted_and_registered,
    load,
    load_assigned,
    optimizer,
    there_and_back,
    swapped,
    vector,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_changed_weight_is_seen(way, used_before, backend, kind):
    rnn = getattr(rnnfast, kind)(I, H, dtype=torch.float64, backend=backend)
    x, w = x64(), x64(GATES[kind] * H, H)
    if used_before:
        rnn(x)[0].sum().backward()
        rnn.zero_grad()
    call = way(rnn, w) or rnn
    wanted = getattr(nn, kind)(I, H, dtype=torch.float64)
    now = {name: p.detach() for name, p in rnn.named_parameters()}
    wanted.load_state_dict({name: now[name] for name in wanted.state_dict()} | {"weight_hh_l0": w})
    assert_same(call(x)[0], wanted(x)[0])


def test_functional_call_is_differentiated_by_what_it_was_given(backend, kind):
    old, new = twins(backend, I, H, 2, kind=kind)
    w, x = x64(GATES[kind] * H, H).requires_grad_(), x64()
    grads = [torch.autograd.grad(functional(rnn, w)(x)[0].sum(), w)[0] for rnn in (new, old)]
    assert_same(*grads)


def test_swap_module_params_on_conversion(backend, kind):
    rnn = getattr(rnnfast, kind)(I, H, backend=backend)
    rnn(torch.randn(T, B, I))
    weight = rnn.weight_hh_l0
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        rnn.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert rnn.weight_hh_l0 is weight
    assert rnn(x64())[0].dtype == torch.float64


# Gradients


def test_parameters_may_be_frozen_one_by_one(backend, kind):
    old, new = twins(backend, I, H, 2, bidirectional=True, kind=kind)
    x = x64()
    for name, _ in new.named_parameters():
        for rnn in (old, new):
            rnn.zero_grad(set_to_none=True)
            for other, p in rnn.named_parameters():
                p.requires_grad_(other != name)
        assert_same_results(results(new, x), results(old, x))
        new(x)[0].sum().backward()
        assert new.get_parameter(name).grad is None
    for p in new.parameters():
        p.requires_grad_(False)
    assert not new(x)[0].requires_grad
    found = results(new, x)
    assert found.keys() - {"c_n"} == {"output", "h_n", "d input"}


@pytest.mark.parametrize("used", ["output", "h_n"])
def test_only_one_output_is_used(used, backend, kind):
    old, new = twins(backend, I, H, 2, bidirectional=True, kind=kind)
    x, pick = x64(), ["output", "h_n"].index(used)
    for rnn in (old, new):
        for value in tensors(rnn(x)[pick]):
            (value**2).sum().backward(retain_graph=True)
    for p, q in zip(new.parameters(), old.parameters()):
        assert_same(p.grad, q.grad)


def test_gradients_that_nothing_needs_are_none(backend, kind):
    _, new = twins(backend, I, H, 2, kind=kind)
    x, hx = x64().requires_grad_(), leaf(start(kind, x64(2, B, H)))
    h_n = tensors(new(x, hx)[1])
    sum(state[0].sum() for state in h_n).backward()  # the lower layer alone
    assert new.weight_hh_l0.grad is not None
    upper = new.weight_hh_l1.grad
    assert upper is None or (upper == 0).all()
    for state in tensors(hx):
        assert (state.grad[0] != 0).any()
        assert (state.grad[1] == 0).all()
    assert x.grad is not None


def test_gradients_accumulate(backend, kind):
    _, new = twins(backend, I, H, 2, bidirectional=True, kind=kind)
    check_accumulation(new)


def test_gradients_of_a_batch_norm_accumulate(own_backend):
    check_accumulation(rnnfast.RNN(I, H, 2, bidirectional=True, norm="batch", backend=own_backend))


def check_accumulation(rnn):
    rnn = rnn.to(torch.float64)
    x = x64()
    rnn(x)[0].square().sum().backward()
    once = {name: p.grad.clone() for name, p in rnn.named_parameters()}
    rnn(x)[0].square().sum().backward()
    for name, p in rnn.named_parameters():
        assert_same(p.grad, 2 * once[name], name)


def test_second_backward_gives_the_same_bits(backend, kind):
    """PyTorch's test_rnn_retain_variables."""
    _, new = twins(backend, I, H, 2, bidirectional=True, kind=kind)
    x, hx = x64().requires_grad_(), leaf(start(kind, x64(4, B, H)))
    leaves = [x, *tensors(hx), *new.parameters()]
    output, h_n = new(x, hx)
    loss = (output**2).sum() + sum((state**3).sum() for state in tensors(h_n))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


IN_PLACE = {
    "input": lambda x, hx, rnn, out: x.mul_(3),
    "hx": lambda x, hx, rnn, out: tensors(hx)[-1].mul_(3),
    "W_hh": lambda x, hx, rnn, out: rnn.weight_hh_l0.mul_(3),
    "W_ih": lambda x, hx, rnn, out: rnn.weight_ih_l0.mul_(3),
    "bias": lambda x, hx, rnn, out: rnn.bias_hh_l0.mul_(3),
    "output": lambda x, hx, rnn, out: out[0].mul_(3),
    "h_n": lambda x, hx, rnn, out: out[-1].mul_(3),
    "lengths": lambda x, hx, rnn, out: rnn.lengths.fill_(1),
}


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_change_in_place_before_backward_raises_or_is_right(what, batch_first, backend, kind):
    _, new = twins(backend, I, H, batch_first=batch_first, kind=kind)
    rnn_lengths = torch.tensor([T, 3] if not batch_first else [B, 1, B, 0, 2, 2])
    batch = len(rnn_lengths)

    def gradients(rnn, change):
        leaves = [leaf(given[0]), *tensors(leaf(start(kind, given[1])))]
        x, *states = (v * 1 for v in leaves)
        hx = tuple(states) if kind == "LSTM" else states[0]
        rnn.lengths = rnn_lengths.clone()
        output, h_n = rnn(x, hx, lengths=rnn.lengths)
        with torch.no_grad():
            if change:
                change(x, hx, rnn, [v.detach() for v in (output, *tensors(h_n))])
        loss = (output * given[2]).sum()
        loss = loss + sum((state * given[3]).sum() for state in tensors(h_n))
        return torch.autograd.grad(loss, [*leaves, *rnn.parameters()])

    given = x64(), x64(1, batch, H), x64(T, B, H), x64(1, batch, H)
    wanted = gradients(copy.deepcopy(new), None)
    try:
        found = gradients(copy.deepcopy(new), IN_PLACE[what])
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
    else:
        for a, b in zip(found, wanted):
            assert_same(a, b)


def test_an_output_changed_in_the_graph_raises_or_is_right(backend, kind):
    """As users write it: ``output.mul_(mask)``."""
    for batch_first in (False, True):
        _, new = twins(backend, I, H, batch_first=batch_first, kind=kind)
        x, mask = x64(), x64(T, B, H)
        wanted = torch.autograd.grad((new(x)[0] * mask).sum(), list(new.parameters()))
        output, _ = new(x)
        try:
            output.mul_(mask)
            found = torch.autograd.grad(output.sum(), list(new.parameters()))
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
        else:
            for a, b in zip(found, wanted):
                assert_same(a, b)


def test_no_grad_and_inference_mode(backend, kind):
    _, new = twins(backend, I, H, 2, bidirectional=True, kind=kind)
    x = x64()
    wanted = new(x)[0]
    with torch.no_grad():
        output, h_n = new(x)
    assert not any(v.requires_grad for v in (output, *tensors(h_n)))
    assert torch.equal(output, wanted)
    with torch.inference_mode():
        output, _ = new(x)
        inside = new(x64(), start(kind, x64(4, B, H)))[0]
    assert output.is_inference()
    assert inside.is_inference()
    assert torch.equal(output, wanted)
    assert not new.eval()(x.requires_grad_())[0].is_inference()


def test_backward_in_eval_mode(backend, kind):
    """cuDNN refuses it."""
    old, new = twins(backend, I, H, 2, dropout=0.5, kind=kind)
    x = x64()
    assert_same_results(results(new.eval(), x), results(old.eval(), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, backend, kind):
    _, new = twins(backend, I, H, 2, dropout=0.5, kind=kind)
    x, hx = x64().requires_grad_(), leaf(start(kind, x64(2, B, H)))

    def checkpointed(x, hx):
        return checkpoint(new, x, hx, use_reentrant=reentrant)

    found = []
    for run in (new, checkpointed):
        torch.manual_seed(1)
        new.zero_grad()
        run(x, hx)[0].sum().backward()
        found.append(new.weight_hh_l0.grad)
    assert torch.equal(*found)


def test_saved_tensors_can_be_packed_away(backend, kind):
    _, new = twins(backend, I, H, 2, kind=kind)
    x = x64()
    wanted = results(new, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert_same_results(results(new, x), wanted)
    with torch.autograd.set_detect_anomaly(True):
        assert_same_results(results(new, x), wanted)


# Hooks


def test_forward_hooks(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    x, hx, seen = x64(), start(kind, x64(1, B, H)), []
    new.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    new.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    new.register_forward_hook(lambda m, args, kwargs, out: (out[0] + 1, out[1]), with_kwargs=True)
    output, _ = new(x, hx=hx)
    ((args, (plain, _)),) = seen
    assert torch.equal(args[0], 2 * x)
    assert torch.equal(output, plain + 1)
    assert_same(plain, rnnless(new)(2 * x, hx)[0])


def rnnless(rnn):
    """The same weights in a fresh module of torch."""
    torchs = getattr(nn, type(rnn).__name__)
    fresh = torchs(rnn.input_size, rnn.hidden_size, rnn.num_layers, dtype=torch.float64)
    fresh.load_state_dict(rnn.state_dict())
    return fresh


def test_full_backward_hooks_are_torchs(backend, kind):
    x, hx, upstream = x64(), start(kind, x64(1, B, H)), x64(T, B, H)
    seen = []
    for rnn in twins(backend, I, H, kind=kind):
        rnn.register_full_backward_pre_hook(lambda m, out: (out[0] * 2, out[1]))
        rnn.register_full_backward_hook(lambda m, ins, out: seen.append((ins, out)))
        rnn(leaf(x), leaf(hx))[0].backward(upstream)
    (old_in, old_out), (new_in, new_out) = seen
    for a, b in zip(new_in, old_in):
        assert (a is None) == (b is None)
        if a is not None:  # torch's hooks do not look into a tuple, the hx of an LSTM
            assert_same(a, b)
    assert_same(new_out[0], 2 * upstream)
    assert len(new_in) == len(old_in) == 2
    assert new_out[1] is None
    assert old_out[1] is None


def test_parameter_hooks_and_retained_gradients(backend, kind):
    _, new = twins(backend, I, H, kind=kind)
    seen = {}
    new.weight_hh_l0.register_hook(lambda g: g * 2)
    new.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.update(after=p.grad.clone()))
    x = x64()
    plain = results(rnnless(new), x)["d weight_hh_l0"]
    output, h_n = new(x)
    output.retain_grad()
    generator = torch.Generator().manual_seed(7)
    values = output, *tensors(h_n)
    w, *w_n = (torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values)
    sum((v * upstream).sum() for v, upstream in zip(values, (w, *w_n))).backward()
    assert_same(seen["after"], 2 * plain)
    assert torch.equal(output.grad, w)


# Copies and files


def copies(rnn):
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(rnn),
        "pickle": pickle.loads(pickle.dumps(rnn)),
        "torch.save": torch.load(file, weights_only=False),
    }


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_share_nothing(way, backend, kind):
    rnn = getattr(rnnfast, kind)(I, H, 2, dropout=0.5, dtype=torch.float64, backend=backend).eval()
    x = x64()
    wanted = rnn(x)[0]
    wanted.sum().backward()
    twin = copies(rnn)[way]
    assert type(twin) is getattr(rnnfast, kind)
    assert str(twin) == str(rnn)
    assert twin.backend == backend
    assert not twin.training
    assert torch.equal(twin(x)[0], wanted)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert not torch.equal(twin(x)[0], wanted)
    assert torch.equal(rnn(x)[0], wanted)


def test_copy_of_a_module_with_options_of_its_own():
    rnn = rnnfast.RNN(H, H, 2, "sigmoid", init="orthogonal", residual=True, dtype=torch.float64)
    for twin in copies(rnn).values():
        assert torch.equal(twin(x64(T, B, H) * 0)[0], rnn(x64(T, B, H) * 0)[0])
        twin.reset_parameters()
        assert_same(twin.weight_hh_l0 @ twin.weight_hh_l0.T, torch.eye(H).double())


def _output(rnn, x):
    return rnn(x)[0].tolist()


def test_share_memory_and_another_process():
    rnn = rnnfast.RNN(I, H, dtype=torch.float64).share_memory()
    assert all(p.is_shared() for p in rnn.parameters())
    x = x64()
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as other:
        got = other.submit(_output, rnn, x).result(timeout=120)
    assert got == rnn(x)[0].tolist()


def test_data_parallel_replica(backend, kind):
    """The steps of nn.DataParallel, without GPUs."""
    rnn = getattr(rnnfast, kind)(I, H, dtype=torch.float64, backend=backend)
    replica = rnn._replicate_for_data_parallel()
    for name, p in rnn.named_parameters():
        setattr(replica, name, p * 2)
    x = x64()
    doubled = copy.deepcopy(rnn)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    output = replica(x)[0]
    assert_same(output, doubled(x)[0])
    output.sum().backward()
    assert rnn.weight_hh_l0.grad is not None
