"""Derivatives of every kind, and what autograd keeps, checks and is allowed to do in between."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint
from twins import Hx, outputs, start, tensors

import rnnfast
from rnnfast.backends import cpu

# forward mode loads decompositions that torch itself still scripts
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

NONLINEARITIES = ["tanh", "relu", "sigmoid", "softplus"]
LENGTHS = [None, [3, 0, 2]]
T, B, IN, H = 3, 3, 2, 3

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 1, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(**options)


def recurrence_inputs(D: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return normal(T, B, D * H), normal(D, H, H, seed=2), normal(D, B, H, seed=3)


def layer(backend: str, seed: int = 0, kind: str = "RNN", **options) -> nn.RNNBase:
    torch.manual_seed(seed)
    return getattr(rnnfast, kind)(IN, H, backend=backend, dtype=torch.float64, **options)


def first_state(kind: str, *shape: int, **options) -> Hx:
    """Leaves: h, and for an LSTM a c beside it."""
    if kind != "LSTM":
        return normal(*shape, seed=5, **options)
    return normal(*shape, seed=5, **options), normal(*shape, seed=6, **options)


def squares(found: list[Tensor]) -> Tensor:
    return sum(x.square().sum() for x in found)


def twin(rnn: nn.RNNBase, backend: str, **options) -> nn.RNNBase:
    other = layer(backend, **options)
    other.load_state_dict(rnn.state_dict())
    return other


def assert_close(actual, wanted) -> None:
    """float64, to rounding: 1e-12 of the largest element of each."""
    if isinstance(wanted, Tensor):
        assert actual.shape == wanted.shape
        assert wanted.abs().max() > 0, "nothing to compare"
        assert (actual - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    elif isinstance(wanted, dict):
        assert actual.keys() == wanted.keys()
        assert_close(list(actual.values()), list(wanted.values()))
    else:
        assert len(actual) == len(wanted)
        for a, w in zip(actual, wanted):
            assert_close(a, w)


# ------------------------------------------------------------------------- against differences


@every_backend
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("with_h_0", [True, False])
def test_first_second_and_forward_derivatives(backend, nonlinearity, lengths, D, with_h_0):
    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return rnnfast.functional.rnn(
            *inputs, lengths=lengths, nonlinearity=nonlinearity, backend=backend
        )

    inputs = recurrence_inputs(D)[: 3 if with_h_0 else 2]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@every_backend
@pytest.mark.parametrize("wanted", ["p", "w_hh", "h_0"])
def test_gradients_of_some_of_the_inputs(backend, wanted):
    inputs = dict(zip(("p", "w_hh", "h_0"), recurrence_inputs(2)))
    for name, x in inputs.items():
        x.requires_grad_(name == wanted)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return rnnfast.functional.rnn(**{**inputs, wanted: x}, backend=backend)

    assert gradcheck(function, inputs[wanted])
    assert gradgradcheck(function, inputs[wanted])


@every_backend
@pytest.mark.parametrize(
    "options", [{"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"num_heads": 3}]
)
def test_a_module_with_all_of_its_parameters(backend, kind, options):
    more = {"return_cell_states": True} if kind == "LSTM" else {}
    rnn = layer(backend, kind=kind, **options, **more)
    names, values = zip(*rnn.named_parameters())
    reset = torch.tensor([[False, True], [False, False], [True, False]])
    swap = options.get("batch_first", False)
    rows = {"lengths": [1, 3], "reset": reset.T if swap else reset}
    layers = (2 if "bidirectional" in options else 1) * rnn.num_layers

    def function(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        n = 2 if kind == "LSTM" else 1
        hx, parameters = others[:n] if n == 2 else others[0], dict(zip(names, others[n:]))
        return tuple(outputs(lambda *a: functional_call(rnn, parameters, a, rows), x, hx))

    x = normal(2, 3, IN) if swap else normal(3, 2, IN)
    inputs = x, *tensors(first_state(kind, layers, 2, H)), *values
    # one random direction instead of each element in turn
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@every_backend
def test_only_the_parameters_that_ask_get_a_gradient(backend, kind):
    names = [name for name, _ in layer(backend, kind=kind).named_parameters()]
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, n) for n in (1, 2)):
        rnn, everything = layer(backend, kind=kind), layer(backend, kind=kind)
        for name, parameter in rnn.named_parameters():
            parameter.requires_grad_(name in wanted)
        for module in (rnn, everything):
            module(normal(T, B, IN, requires_grad=False))[0].square().sum().backward()
        for (name, p), q in zip(rnn.named_parameters(), everything.parameters()):
            assert (p.grad is not None) == (name in wanted)
            assert p.grad is None or torch.equal(p.grad, q.grad)


# ------------------------------------------------------------------------------- higher orders


def gradient_penalty(rnn: nn.RNNBase, x: Tensor, order: int) -> list[Tensor]:
    """Gradients of the norm of the gradient (of the norm of the gradient ...)."""
    y, *last = outputs(rnn, x)
    value = (y**3).sum() + squares(last)
    for _ in range(order - 1):
        grads = torch.autograd.grad(value, [x, *rnn.parameters()], create_graph=True)
        value = sum(g.square().sum() for g in grads)
    return list(torch.autograd.grad(value, [x, *rnn.parameters()]))


@needs_cpu
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        *({"nonlinearity": f} for f in NONLINEARITIES),
        {"kind": "LSTM", "return_cell_states": True},
        {"kind": "GRU", "num_heads": 3},
    ],
    ids=[*NONLINEARITIES, "lstm", "gru"],
)
def test_higher_orders_agree_with_the_oracle(order, options):
    options = {"bidirectional": True, "num_layers": 2, **options}
    rnn = layer("cpu", **options)
    x = normal(5, 2, IN)
    wanted = gradient_penalty(twin(rnn, "reference", **options), x, order)
    assert_close(gradient_penalty(rnn, x, order), wanted)


@every_backend
def test_a_penalty_on_gradients_and_the_loss_itself_train_together(backend, kind):
    """create_graph, then backward of both at once, as WGAN-GP does."""

    def accumulated(module: nn.Module) -> list[Tensor]:
        x = normal(5, 2, IN)
        loss = module(x)[0].square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    rnn = layer(backend, kind=kind)
    torch_rnn = getattr(nn, kind)(IN, H, dtype=torch.float64)
    torch_rnn.load_state_dict(rnn.state_dict())
    assert_close(accumulated(rnn), accumulated(torch_rnn))


@needs_cpu
def test_a_first_order_gradient_is_the_same_with_and_without_create_graph(kind):
    rnn, x = layer("cpu", kind=kind), normal(5, 2, IN)
    loss = rnn(x)[0].square().sum()
    leaves = [x, *rnn.parameters()]
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_close(torch.autograd.grad(loss, leaves, create_graph=True), plain)


# ---------------------------------------------------------------------------------- torch.func


@needs_cpu
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "jvp", "vjp", "grad"])
def test_torch_func_agrees_with_autograd_on_the_oracle(transform, kind):
    rnn = layer("cpu", kind=kind, bidirectional=True)
    oracle = twin(rnn, "reference", kind=kind, bidirectional=True)
    x, tangent = (
        normal(T, 2, IN, requires_grad=False),
        normal(T, 2, IN, seed=4, requires_grad=False),
    )

    def output(module):
        return lambda x: module(x)[0]

    def loss(module):
        return lambda x: (module(x)[0] ** 3).sum() + squares(outputs(module, x)[1:])

    func, classic = torch.func, torch.autograd.functional
    if transform in ("jacrev", "jacfwd"):
        found = getattr(func, transform)(output(rnn))(x)
        wanted = classic.jacobian(output(oracle), x)
    elif transform == "hessian":
        found, wanted = func.hessian(loss(rnn))(x), classic.hessian(loss(oracle), x)
    elif transform == "jvp":
        found = func.jvp(output(rnn), (x,), (tangent,))
        wanted = classic.jvp(output(oracle), x, tangent)
    elif transform == "vjp":
        y, pull = func.vjp(output(rnn), x)
        (found,) = pull(torch.ones_like(y))
        wanted = classic.vjp(output(oracle), x, torch.ones_like(y))[1]
    else:
        found = func.grad(loss(rnn))(x)
        wanted = classic.jacobian(loss(oracle), x)
    assert_close(found, wanted)


@every_backend
def test_gradients_of_functional_parameters(backend, kind):
    rnn, x = layer(backend, kind=kind), normal(T, B, IN, requires_grad=False)
    parameters = dict(rnn.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(rnn, parameters, (x,))[0].square().sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_close(list(found.values()), wanted)


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_the_batch(backend, kind, axis):
    rnn = layer(backend, kind=kind, num_layers=2, bidirectional=True)
    x = normal(T, B, IN, requires_grad=False)
    x = x.transpose(0, 1) if axis == 0 else x
    found = outputs(torch.vmap(rnn, in_dims=axis, out_dims=axis), x)  # each sample unbatched
    singles = zip(*(outputs(rnn, sample) for sample in x.unbind(axis)))
    assert_close(found, [torch.stack(values, axis) for values in singles])


@every_backend
def test_vmap_over_an_ensemble(backend, kind):
    members = [layer(backend, seed, kind) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    x = normal(T, B, IN, requires_grad=False)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (parameters, buffers), (x,))[0]

    y = torch.vmap(call)(parameters, buffers)
    assert_close(y, torch.stack([member(x)[0] for member in members]))
    y.square().sum().backward()
    for i, member in enumerate(members):
        member(x)[0].square().sum().backward()
        for name, p in member.named_parameters():
            assert_close(parameters[name].grad[i], p.grad)


@every_backend
def test_gradients_per_sample(backend, kind):
    rnn, x = layer(backend, kind=kind), normal(T, B, IN, requires_grad=False)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(rnn, parameters, (sample,))[0].square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(B):
        wanted = torch.autograd.grad(rnn(x[:, b])[0].square().sum(), list(rnn.parameters()))
        assert_close([found[name][b] for name in parameters], wanted)


@every_backend
def test_a_batch_of_output_gradients_at_once(backend, kind):
    rnn, x = layer(backend, kind=kind), normal(T, B, IN)
    found = outputs(rnn, x)
    grads = [normal(4, *v.shape, requires_grad=False) for v in found]
    leaves = [x, *rnn.parameters()]
    options = {"retain_graph": True}
    batched = torch.autograd.grad(found, leaves, grads, is_grads_batched=True, **options)
    for i in range(4):
        wanted = torch.autograd.grad(found, leaves, [g[i] for g in grads], **options)
        assert_close([g[i] for g in batched], wanted)


@every_backend
@pytest.mark.parametrize("tracked", [True, "sample"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True},
        {"norm": "layer"},
        {"num_heads": 3, "clip_state_grad": 0.1, "bptt_window": 2},
        {"kind": "LSTM", "clip_state_grad": 0.1, "bptt_window": 2},
        {"kind": "GRU", "num_heads": 3, "clip_state_grad": 0.1},
    ],
)
def test_a_batch_of_output_gradients_leaves_the_record(options, create_graph, tracked, backend):
    rnn, x = layer(backend, track_gradient_flow=tracked, **options), normal(T, B, IN)
    y = rnn(x)[0]
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    before = rnn.gradient_flow.state_norm
    grads, leaves = normal(4, *y.shape, requires_grad=False), [x, *rnn.parameters()]
    found = torch.autograd.grad(
        y, leaves, grads, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    assert torch.equal(rnn.gradient_flow.state_norm, before)
    for i in range(4):
        assert_close([g[i] for g in found], torch.autograd.grad(y, leaves, grads[i], True))
    assert not torch.equal(rnn.gradient_flow.state_norm, before)


@every_backend
@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"kind": "LSTM"}, {"kind": "GRU"}])
def test_jacobian_and_hessian_in_one_pass(options, backend):
    rnn, x = layer(backend, **options), normal(3, 2, IN)
    functional = torch.autograd.functional
    for create_graph in (False, True):
        found, wanted = (
            functional.jacobian(lambda v: outputs(rnn, v)[-1], x, create_graph, vectorize=vectorize)
            for vectorize in (True, False)
        )
        assert_close([found], [wanted])
    found, wanted = (
        functional.hessian(lambda v: squares(outputs(rnn, v)[1:]), x, vectorize=vectorize)
        for vectorize in (True, False)
    )
    assert_close([found], [wanted])


@every_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_vmap_over_lengths(dtype, kind, backend):
    rnn, x = layer(backend, kind=kind, bidirectional=True), normal(T, B, IN, requires_grad=False)
    lengths = torch.tensor([[3, 0, 1], [T, 2, T]])[:, torch.arange(B) % 3].to(dtype)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(parameters: dict[str, Tensor], lengths: Tensor) -> Tensor:
        def call(x: Tensor) -> tuple[Tensor, Hx]:
            return functional_call(rnn, parameters, (x,), {"lengths": lengths})

        return squares(outputs(call, x))

    for given, axis in ((lengths, 0), (lengths.T, 1)):
        found = torch.vmap(torch.func.grad(loss), in_dims=(None, axis))(parameters, given)
        for i, own in enumerate(lengths):
            wanted = torch.autograd.grad(loss(dict(rnn.named_parameters()), own), rnn.parameters())
            assert_close([found[name][i] for name in parameters], wanted)


@every_backend
def test_lengths_that_vmap_maps_are_checked(backend):
    rnn, x = layer(backend), normal(T, B, IN, requires_grad=False)
    lengths = torch.full((4, B), 1)
    lengths[2, 1] = T + 1
    with pytest.raises(ValueError, match=f"lengths: given {T + 1}, wanted 0 to T = {T}"):
        torch.vmap(lambda own: rnn(x, lengths=own)[0])(lengths)


# ------------------------------------------------------------------------- the graph and memory


def trained(rnn: nn.RNNBase, call=None) -> list[Tensor]:
    """The gradients after call(x, hx), by default rnn itself."""
    rnn.zero_grad()
    x, hx = normal(T, B, IN), first_state(rnn.mode.partition("_")[0], 1, B, H)
    squares(outputs(call or rnn, x, hx)).backward()
    return [x.grad, *(h.grad for h in tensors(hx)), *(p.grad for p in rnn.parameters())]


def assert_same_bits(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


@every_backend
def test_a_retained_graph_gives_the_same_bits_and_a_freed_one_raises(backend, kind):
    rnn, x = layer(backend, kind=kind, bidirectional=True), normal(T, B, IN)
    loss = squares(outputs(rnn, x))
    leaves = [x, *rnn.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, leaves, retain_graph=True), first)
    assert_same_bits(torch.autograd.grad(loss, leaves), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@every_backend
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend, kind, use_reentrant):
    rnn = layer(backend, kind=kind)
    wanted = trained(rnn)

    def flat(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:  # checkpoint looks into no tuple
        return tuple(outputs(rnn, x, hx if kind == "LSTM" else hx[0]))

    def again(x: Tensor, hx: Hx) -> tuple[Tensor, Hx]:
        y, *last = checkpoint(flat, x, *tensors(hx), use_reentrant=use_reentrant)
        return y, tuple(last)

    found = trained(rnn, again)
    assert_same_bits(found, wanted)


@every_backend
def test_saved_tensors_may_be_moved_and_copied(backend, kind):
    rnn = layer(backend, kind=kind)
    wanted = trained(rnn)
    with save_on_cpu():
        assert_same_bits(trained(rnn), wanted)
    with saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        assert_same_bits(trained(rnn), wanted)


@every_backend
def test_anomaly_mode_passes_sound_gradients_and_names_the_source_of_nan(backend, kind):
    rnn = layer(backend, kind=kind)
    wanted = trained(rnn)
    with torch.autograd.set_detect_anomaly(True):
        assert_same_bits(trained(rnn), wanted)
    with torch.no_grad():
        rnn.weight_hh_l0[0, 0] = torch.nan
    with (
        pytest.warns(UserWarning, match="Traceback of forward call"),
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        rnn(normal(T, B, IN))[0].sum().backward()


@every_backend
@pytest.mark.parametrize("changed", ["x", "h_0", "weight_ih_l0", "weight_hh_l0"])
def test_changing_in_place_what_backward_needs_raises(backend, kind, changed):
    rnn = layer(backend, kind=kind)
    x, h_0 = normal(T, B, IN, requires_grad=False), normal(1, B, H, requires_grad=False)
    y, _ = rnn(x.requires_grad_(), start(kind, h_0))
    with torch.no_grad():
        {"x": x, "h_0": h_0}.get(changed, getattr(rnn, changed, None)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_backend
def test_changing_the_output_in_place_raises_or_is_right(backend, kind):
    rnn, x = layer(backend, kind=kind), normal(T, B, IN)
    wanted = torch.autograd.grad((2 * rnn(x)[0]).sum(), x)
    y, _ = rnn(x)
    try:
        found = torch.autograd.grad(y.mul_(2).sum(), x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_close(found, wanted)


@every_backend
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_final_state_is_memory_of_its_own(backend, kind, num_layers):
    rnn, x = layer(backend, kind=kind, num_layers=num_layers), normal(T, B, IN)
    hx = first_state(kind, num_layers, B, H)
    leaves = [x, *tensors(hx)]
    wanted = torch.autograd.grad(sum(v.sum() for v in outputs(rnn, x, hx)), leaves)
    y, *last = outputs(rnn, x, hx)
    before = y.clone()
    last = [h.mul_(3) for h in last]
    assert torch.equal(y, before)
    found = torch.autograd.grad(y.sum() + sum(h.sum() / 3 for h in last), leaves)
    assert_close(found, wanted)


@every_backend
def test_the_final_state_of_functional_rnn_is_no_view(backend):
    """Truncated training detaches it in place, which autograd forbids of a view."""
    p, w_hh, h_0 = normal(T, B, H), normal(H, H, seed=2), normal(B, H, seed=3)
    for weight, state in ((w_hh, h_0), (w_hh[None], h_0[None])):
        y, h_n = rnnfast.functional.rnn(p, weight, state, backend=backend)
        assert h_n.shape == state.shape
        assert not h_n._is_view()
        assert torch.equal(h_n.detach_(), y[-1].view_as(state))
        assert not h_n.requires_grad


@every_backend
@pytest.mark.parametrize("used", ["output", "a last state", "the last step"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_loss_on_part_of_what_comes_out(backend, kind, used, lengths):
    """The gradient of the rest is then absent, or 0 almost everywhere."""
    found = []
    for name in (backend, "reference"):
        module = layer(name, kind=kind, bidirectional=True)
        x, hx = normal(T, B, IN), first_state(kind, 2, B, H)
        y, *last = outputs(module, x, hx, lengths=lengths)
        part = {"output": y, "a last state": last[-1], "the last step": y[-1]}[used]
        leaves = [x, *tensors(hx), *module.parameters()]
        found.append(torch.autograd.grad(part.square().sum(), leaves))
    assert_close(*found)


@every_backend
def test_gradients_that_are_expanded_or_strided(backend, kind):
    rnn, x = layer(backend, kind=kind, bidirectional=True), normal(T, B, IN)
    y, _ = rnn(x)
    scalar = torch.ones((), dtype=torch.float64)
    strided = torch.ones(2 * H, B, T, dtype=torch.float64).permute(2, 1, 0)
    leaves = [x, *rnn.parameters()]
    wanted = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for grad in (scalar.expand_as(y), strided, torch.ones_like(y[:1]).expand_as(y)):
        found = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        assert_same_bits(list(found), list(wanted))


@every_backend
def test_padding_takes_no_gradient(backend, kind):
    rnn, x = layer(backend, kind=kind, bidirectional=True), normal(T, B, IN)
    squares(outputs(rnn, x, lengths=[3, 0, 2])).backward()
    assert x.grad[:, 1].count_nonzero() == 0
    assert x.grad[2, 2].count_nonzero() == 0
    assert (x.grad[:, 0] != 0).all()
    assert (x.grad[:2, 2] != 0).all()


@needs_cpu
@pytest.mark.parametrize("write", ["all", "a step", "relu_"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
def test_backward_is_refused_after_a_write_into_the_output(batch_first, batched, write, kind):
    """As with cuDNN's nn.RNN, which reads it, too; in both layouts it is backward that raises."""
    rnn = getattr(rnnfast, kind)(3, 4, batch_first=batch_first, backend="cpu")
    y, _ = rnn(torch.randn(5, 2, 3) if batched else torch.randn(5, 3))
    if write == "all":
        y += 1
    elif write == "a step":
        y[0] = 0
    else:
        torch.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_cpu
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_last_state_may_be_written_before_backward(batch_first, kind):
    rnn = getattr(rnnfast, kind)(3, 4, batch_first=batch_first, backend="cpu")
    x = torch.randn(5, 2, 3)
    wanted = torch.autograd.grad(3 * outputs(rnn, x)[-1].sum(), list(rnn.parameters()))
    last = outputs(rnn, x)[-1]
    last *= 3
    found = torch.autograd.grad(last.sum(), list(rnn.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted))
