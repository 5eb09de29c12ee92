"""Layer norm, reset, bptt_window, clip_state_grad and num_heads of one recurrence.

The judge is a loop over rows, heads and steps, written from the definition and not from the oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rnnfast
from rnnfast import ops
from rnnfast.backends import cpu
from rnnfast.recurrence import loop, record
from rnnfast.recurrence.groups import (
    Kept,
    Options,
    OutputGradients,
    Rows,
    Saved,
    States,
    Weights,
)

# forward mode loads decompositions that torch itself still scripts
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.usefixtures("one_torch_thread"),
]

NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda a: torch.log1p(torch.exp(a)),  # a is small
}

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Case(NamedTuple):
    leaves: dict[str, Tensor]  # p [T, B, D * H], w_hh [D, H, S], and perhaps norm_weight, norm_bias
    #                            [D * H], h_0 [D, B, H]
    lengths: Tensor | None
    reset: Tensor | None
    grad_y: Tensor | None
    grad_h_n: Tensor | None
    nonlinearity: str = "tanh"
    heads: int = 1
    norm_eps: float = 1e-5
    window: int | None = None
    clip: float | None = None

    def to(self, dtype: torch.dtype) -> Case:
        leaves = {name: x.to(dtype) for name, x in self.leaves.items()}
        grads = {name: getattr(self, name).to(dtype) for name in ("grad_y", "grad_h_n")}
        return self._replace(leaves=leaves, **grads)

    @property
    def options(self) -> Options:
        cell = f"rnn_{self.nonlinearity}"
        D = len(self.leaves["w_hh"])
        return Options(cell, D, self.heads, self.norm_eps, self.window, self.clip)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        names = ("p", "w_hh", "norm_weight", "norm_bias", "h_0")
        return tuple(self.leaves.get(name) for name in names)


def make_case(T, B, S, heads=1, D=2, norm="bias", with_h_0=True, seed=0):
    """norm: None, "bias" or "no bias". No lengths, no reset; both gradients."""
    generator = torch.Generator().manual_seed(seed)
    H = heads * S

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"p": normal(T, B, D * H), "w_hh": normal(D, H, S) * 0.9 / S**0.5}
    norm_weight, norm_bias, h_0 = normal(D * H), normal(D * H), normal(D, B, H)
    if norm is not None:
        leaves["norm_weight"] = norm_weight
    if norm == "bias":
        leaves["norm_bias"] = norm_bias
    if with_h_0:
        leaves["h_0"] = h_0
    return Case(leaves, None, None, normal(T, B, D * H), normal(D, B, H), heads=heads)


@st.composite
def cases(draw) -> Case:
    T, B, D = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    norm = draw(st.sampled_from([None, "bias", "no bias"]))
    # Layer norm of two units loses nearly all of a gradient, and digits with it.
    S = draw(st.integers(1 if norm is None else 4, 6))
    case = make_case(
        T, B, S, draw(st.integers(1, 3)), D, norm, draw(st.booleans()), draw(st.integers(0, 99))
    )
    rows = st.lists(st.integers(0, T), min_size=B, max_size=B)
    points = st.lists(st.booleans(), min_size=T * B, max_size=T * B)
    lengths, reset = draw(st.none() | rows), draw(st.none() | points)
    used = draw(st.sampled_from(["both", "y", "h_n"]))
    return case._replace(
        lengths=None if lengths is None else torch.tensor(lengths),
        reset=None if reset is None else torch.tensor(reset).view(T, B),
        grad_y=None if used == "h_n" else case.grad_y,
        grad_h_n=None if used == "y" else case.grad_h_n,
        nonlinearity=draw(st.sampled_from(list(NONLINEARITIES))),
        norm_eps=draw(st.sampled_from([1e-5, 0.1])),
        window=draw(st.none() | st.integers(1, T + 1)),
        clip=draw(st.sampled_from([None, 0.05, 1.0, 1e6])),
    )


def by_definition(case: Case) -> tuple[Tensor, Tensor]:
    """y and h_n, one row, direction, head and step after the other."""
    p, w_hh, norm_weight, norm_bias, h_0 = case.inputs
    (T, B, _), (D, H, S) = p.shape, w_hh.shape
    f = NONLINEARITIES[case.nonlinearity]

    def clipped(gradient: Tensor) -> Tensor:
        norm = gradient.norm()
        return gradient * (case.clip / norm) if case.clip < norm < torch.inf else gradient

    y = [[[] for _ in range(B)] for _ in range(T)]  # parts of each step and row, side by side
    h_n = [[[] for _ in range(B)] for _ in range(D)]
    for b in range(B):
        length = T if case.lengths is None else int(case.lengths[b])
        for d in range(D):
            for k in range(case.heads):
                units = slice(k * S, (k + 1) * S)
                columns = slice(d * H + k * S, d * H + (k + 1) * S)
                w = w_hh[d, units]
                h = p.new_zeros(S) if h_0 is None else h_0[d, b, units]
                steps = list(range(length))
                for t in steps[::-1] if d else steps:
                    edge = t + 1 if d else t  # crossed on the way into this step
                    if case.reset is not None and edge < length and case.reset[edge, b]:
                        h = p.new_zeros(S)
                    if case.window and 0 < edge < length and edge % case.window == 0:
                        h = h.detach()
                    a = p[t, b, columns] + w @ h
                    if norm_weight is not None:
                        variance = a.var(unbiased=False)
                        a = (a - a.mean()) / (variance + case.norm_eps).sqrt()
                        a = a * norm_weight[columns]
                        a = a if norm_bias is None else a + norm_bias[columns]
                    h = f(a)
                    if case.clip is not None and h.requires_grad:
                        h.register_hook(clipped)
                    y[t][b].append(h)
                for t in range(length, T):
                    y[t][b].append(p.new_zeros(S))
                h_n[d][b].append(h)
    whole = [[torch.cat(parts) for parts in rows] for rows in y]
    last = [[torch.cat(parts) for parts in rows] for rows in h_n]
    return torch.stack([torch.stack(r) for r in whole]), torch.stack([torch.stack(r) for r in last])


def by_package(backend: str):
    def call(case: Case) -> tuple[Tensor, Tensor]:
        return rnnfast.functional.rnn(
            **case.leaves,
            lengths=case.lengths,
            reset=case.reset,
            nonlinearity=case.nonlinearity,
            num_heads=case.heads,
            norm_eps=case.norm_eps,
            bptt_window=case.window,
            clip_state_grad=case.clip,
            backend=backend,
        )

    return call


def by_function(case: Case) -> tuple[Tensor, Tensor]:
    """As a kernel is called: the oracle inside the Function of ops.layer, which a record asks for.

    So what the Function does beyond a kernel is tested where there is none.
    """
    p, w_hh, gamma, beta, h_0 = case.inputs
    T, _, width = p.shape
    D = width // w_hh.shape[1]
    buffer = record.make(record.numbers(D, T, 1), p.device)
    weights = Weights(None, None, None, w_hh.flatten(0, 1), gamma, beta)
    rows = Rows(case.lengths, case.reset)
    inputs = p, weights, States(h_0), rows, buffer
    y, (h_n, _), _ = ops.layer(*inputs, case.options, "reference")
    return y, h_n


def run(case: Case, call) -> dict[str, Tensor]:
    """y, h_n, and a gradient d... of each leaf."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.leaves.items()}
    y, h_n = call(case._replace(leaves=leaves))
    pairs = [(y, case.grad_y), (h_n, case.grad_h_n)]
    # where no row has a step, the loop has nothing to differentiate
    pairs = [(x, g) for x, g in pairs if g is not None and x.requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves.values()]
    if pairs:
        xs, gs = zip(*pairs)
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(xs, list(leaves.values()), gs, **options)
    found = {"y": y.detach(), "h_n": h_n.detach()}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients)}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """float64, to rounding: 1e-12 of the largest entry, of each step where there are steps."""
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        value = found[name]
        assert value.shape == exact.shape, name
        assert value.dtype == exact.dtype == torch.float64, name
        pairs = zip(value, exact) if name in ("y", "dp") else [(value, exact)]
        for t, (v, e) in enumerate(pairs):
            error = (v - e).abs().max().item()
            assert error <= 1e-12 * e.abs().max().item(), f"{name}[{t}]: error {error}"


# -------------------------------------------------------------------------- against the loop


@every_backend
@settings(max_examples=examples(200))
@given(case=cases())
def test_any_mix_of_options_agrees_with_the_definition(backend, case):
    assert_close(run(case, by_package(backend)), run(case, by_definition))


@settings(max_examples=examples(40))
@given(case=cases())
def test_the_function_around_a_kernel_agrees_with_the_definition(case):
    assert_close(run(case, by_function), run(case, by_definition))


def busy_case() -> Case:
    """Every option does something in it."""
    return make_case(7, 3, 4, heads=2, seed=5)._replace(
        lengths=torch.tensor([7, 0, 5]),
        reset=torch.zeros(7, 3, dtype=torch.bool).index_put_(
            (torch.tensor([0, 3, 2, 5]), torch.tensor([0, 0, 2, 2])), torch.tensor(True)
        ),
        norm_eps=0.1,
        window=3,
        clip=1.5,
    )


FORGOTTEN = {
    "lengths": {"lengths": None},
    "reset": {"reset": None},
    "the step of a reset": {"reset": busy_case().reset.index_fill(0, torch.tensor([3]), True)},
    "norm_eps": {"norm_eps": 1e-5},
    "window": {"window": None},
    "clip": {"clip": None},
    "heads": None,
    "norm_weight": None,
    "norm_bias": None,
    "h_0": None,
}


@pytest.mark.parametrize("option", FORGOTTEN)
def test_the_comparison_finds_an_option_forgotten(option):
    case = busy_case()
    wanted = run(case, by_definition)
    if option in case.leaves:
        leaves = {n: x for n, x in case.leaves.items() if n != option}
        if option == "norm_weight":
            leaves.pop("norm_bias")
        found = wanted | run(case._replace(leaves=leaves), by_package("reference"))
    elif option == "heads":
        doubled = case.leaves["w_hh"].unflatten(1, (2, 4)).flip(1).flatten(1, 2)
        found = run(case._replace(leaves=case.leaves | {"w_hh": doubled}), by_package("reference"))
    else:
        found = run(case._replace(**FORGOTTEN[option]), by_package("reference"))
    with pytest.raises(AssertionError):
        assert_close(found, wanted)


@every_backend
def test_resets_beyond_the_length_do_nothing(backend):
    case = busy_case()
    beyond = torch.arange(7).unsqueeze(1) >= case.lengths
    more = case._replace(reset=case.reset | beyond)
    fewer = case._replace(reset=case.reset & ~beyond)
    found, wanted = run(more, by_package(backend)), run(fewer, by_package(backend))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@every_backend
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_beyond_the_length_do_nothing(backend, special):
    case = busy_case()
    beyond = (torch.arange(7).unsqueeze(1) >= case.lengths).unsqueeze(2)
    p, grad_y = (x.detach().masked_fill(beyond, special) for x in (case.leaves["p"], case.grad_y))
    broken = case._replace(leaves=case.leaves | {"p": p}, grad_y=grad_y)
    found, wanted = run(broken, by_package(backend)), run(case, by_package(backend))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------- the formula of backward, by itself


@settings(max_examples=examples(120))
@given(case=cases(), of_norm=st.booleans())
def test_the_formula_of_backward_is_the_derivative_of_forward(case, of_norm):
    """Also of ahat and rstd, which a second derivative asks for."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.leaves.items()}
    case = case._replace(leaves=leaves)
    p, w_hh, gamma, beta, h_0 = case.inputs
    weights = Weights(None, None, None, w_hh.flatten(0, 1), gamma, beta)
    states = States(h_0)
    rows = Rows(case.lengths, case.reset)
    y, (h_n, _), saved, _ = loop.forward(p, weights, states, rows, case.options)
    _, ahat, rstd = saved
    grads = [case.grad_y, case.grad_h_n, None, None]
    if of_norm and ahat is not None:
        grads[2:] = torch.randn_like(ahat), torch.randn_like(rstd)
    pairs = [(x, g) for x, g in zip((y, h_n, ahat, rstd), grads) if g is not None]
    xs, gs = zip(*pairs)
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(xs, list(leaves.values()), gs, **options)
    with torch.no_grad():
        given = OutputGradients(grads[0], States(grads[1]))
        kept = Kept(None, y, weights, states, rows, saved)
        of_saved = Saved(None, *grads[2:])
        found = loop.backward(given, kept, case.options, grad_saved=of_saved)
    by_name = {"p": found.p, "w_hh": found.weights.w_hh.view_as(w_hh), "h_0": found.states.h}
    by_name |= {"norm_weight": found.weights.gamma, "norm_bias": found.weights.beta}
    assert_close(
        {f"d{name}": by_name[name] for name in leaves},
        {f"d{name}": g for name, g in zip(leaves, wanted)},
    )


# --------------------------------------------------------------------- derivatives of other kinds

CALLS = [
    pytest.param(by_package("cpu"), marks=needs_cpu, id="cpu"),
    pytest.param(by_package("reference"), id="reference"),
    pytest.param(by_function, id="reference-as-a-kernel"),
]


def derivable_case(nonlinearity: str, norm: str | None, D: int) -> Case:
    """No window and no clip: what they give is no derivative."""
    case = make_case(3, 2, 3, 2, D, norm, seed=3)
    reset = torch.tensor([[True, False], [False, True], [True, True]])
    return case._replace(
        lengths=torch.tensor([3, 2]), reset=reset, nonlinearity=nonlinearity, norm_eps=0.1
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("norm", "D"), [("bias", 2), ("no bias", 1), (None, 2)])
def test_first_second_and_forward_derivatives(call, nonlinearity, norm, D):
    case = derivable_case(nonlinearity, norm, D)
    names = list(case.leaves)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return call(case._replace(leaves=dict(zip(names, values))))

    inputs = [x.requires_grad_() for x in case.leaves.values()]
    # one random direction instead of each element in turn
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def second_order(case: Case, call) -> dict[str, Tensor]:
    """Gradients of the squared norm of the gradient."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.leaves.items()}
    y, h_n = call(case._replace(leaves=leaves))
    loss = (y**3).sum() + (h_n**2).sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    value = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(value, list(leaves.values()))
    return {f"d{name}": g for name, g in zip(leaves, second)}


class SoftplusOfOutput(torch.autograd.Function):
    """Softplus whose derivative is a function of h, as those of the others are in PyTorch.

    Clipping scales what reaches h in the second pass, too, and so depends on it: PyTorch's own
    softplus is differentiated past h.
    """

    @staticmethod
    def forward(ctx, a):
        h = torch.nn.functional.softplus(a)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - (-ctx.saved_tensors[0]).exp())


@pytest.mark.parametrize("call", [CALLS[0], CALLS[2]])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("norm", [None, "bias"])
@pytest.mark.parametrize(
    "changed", [{}, {"window": 2}, {"window": 1}, {"clip": 0.8}, {"window": 3, "clip": 0.8}]
)
def test_second_order_gradients_agree_with_the_definition(
    call, nonlinearity, norm, changed, monkeypatch
):
    """The oracle is a loop in plain PyTorch with detached states and hooks."""
    monkeypatch.setitem(NONLINEARITIES, "softplus", SoftplusOfOutput.apply)
    case = make_case(6, 2, 4, heads=2, norm=norm, seed=4)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    case = case._replace(lengths=torch.tensor([6, 4]), reset=reset, nonlinearity=nonlinearity)
    case = case._replace(norm_eps=0.1, **changed)
    wanted = second_order(case, by_definition)
    assert_close(second_order(case, by_package("reference")), wanted)
    assert_close(second_order(case, call), wanted)


def test_a_window_and_a_limit_change_second_order_gradients():
    """Otherwise the test above would show nothing."""
    case = make_case(6, 2, 4)
    plain = second_order(case, by_definition)
    for changed in ({"window": 2}, {"clip": 0.8}):
        found = second_order(case._replace(**changed), by_definition)
        assert all(not torch.allclose(found[name], plain[name]) for name in ("dp", "dw_hh"))


@every_backend
@pytest.mark.parametrize("changed", [{}, {"window": 2}, {"clip": 0.8}])
def test_vmap_over_the_batch(backend, changed):
    case = make_case(5, 3, 4, heads=2)._replace(**changed)
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[2, 1] = True
    case = case._replace(reset=reset)

    def call(case: Case) -> tuple[Tensor, Tensor]:
        def one(p: Tensor, h_0: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
            leaves = case.leaves | {"p": p.unsqueeze(1), "h_0": h_0.unsqueeze(1)}
            y, h_n = by_package(backend)(case._replace(leaves=leaves, reset=reset.unsqueeze(1)))
            return y.squeeze(1), h_n.squeeze(1)

        inputs = case.leaves["p"], case.leaves["h_0"], case.reset
        return torch.vmap(one, in_dims=1, out_dims=1)(*inputs)

    assert_close(run(case, call), run(case, by_package(backend)))


@every_backend
def test_gradients_per_sample(backend):
    case = make_case(5, 3, 4, heads=2)._replace(clip=0.8, window=3)

    def loss(leaves: dict[str, Tensor], p: Tensor) -> Tensor:
        leaves = leaves | {"p": p.unsqueeze(1)}
        return by_package(backend)(case._replace(leaves=leaves))[0].square().sum()

    weights = {n: x for n, x in case.leaves.items() if n not in ("p", "h_0")}
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, case.leaves["p"])
    for b in range(3):
        leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
        value = loss(leaves, case.leaves["p"][:, b])
        wanted = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
        assert_close({name: x[b] for name, x in found.items()}, wanted)


@every_backend
@pytest.mark.parametrize("changed", [{}, {"clip": 0.8}, {"window": 2}])
def test_a_jvp_is_the_transpose_of_the_gradient(backend, changed):
    """A window stops tangents, too; a limit is of the way back alone."""
    case = busy_case()._replace(**({"window": None, "clip": None} | changed))
    names, values = zip(*case.leaves.items())
    tangents = tuple(torch.randn_like(x) for x in values)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return by_package(backend)(case._replace(leaves=dict(zip(names, values))))

    _, (dy, dh_n) = torch.func.jvp(function, values, tangents)
    gradients = run(case._replace(clip=None), by_definition)
    left = (dy * case.grad_y).sum() + (dh_n * case.grad_h_n).sum()
    terms = torch.stack([(gradients[f"d{n}"] * v).sum() for n, v in zip(names, tangents)])
    assert (left - terms.sum()).abs() <= 1e-12 * terms.abs().sum()


@every_backend
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_not_scaled(backend, special):
    """That of its head and row alone; the rest is."""
    case = make_case(1, 2, 3, heads=2, D=1, norm=None)._replace(clip=0.5)
    broken = case._replace(grad_y=case.grad_y.clone())
    broken.grad_y[0, 1, 4] = special
    found = run(broken, by_package(backend))["dp"]
    whole = run(broken._replace(clip=None), by_package(backend))["dp"]
    clipped = run(case, by_package(backend))["dp"]
    assert not torch.equal(whole[0, 0], clipped[0, 0])
    assert torch.equal(found[0, 0], clipped[0, 0])
    assert torch.equal(found[0, 1, :3], clipped[0, 1, :3])
    assert torch.equal(found[0, 1, [3, 5]], whole[0, 1, [3, 5]])
    assert not found[0, 1, 4].isfinite()
    assert found[0, 1, 4].isnan() == whole[0, 1, 4].isnan()


# ------------------------------------------------------------------------------------ episodes


@every_backend
@pytest.mark.parametrize("norm", [None, "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_episodes_in_a_row_give_what_each_gives_alone(backend, norm, dtype):
    """Bit for bit; sums over time, which are added up in another order, to rounding."""
    T, B, H = 9, 3, 4
    starts = torch.tensor([2, 5, 8])  # of the second episode of each row
    case = make_case(T, B, H, norm=norm).to(dtype)
    reset = torch.arange(T).unsqueeze(1) == starts
    whole = run(case._replace(reset=reset), by_package(backend))

    def shifted(x: Tensor) -> Tensor:
        """The second episodes, from step 0 on."""
        at = torch.arange(T).unsqueeze(1) + starts
        return x.gather(0, at.clamp(max=T - 1).unsqueeze(2).expand_as(x))

    def only(x: Tensor, d: int) -> Tensor:
        return torch.stack([v if i == d else torch.zeros_like(v) for i, v in enumerate(x)])

    parts = []
    for move, lengths, first in ((lambda x: x, starts, 0), (shifted, T - starts, 1)):
        # time begins in the first episode, for the reverse direction in the second
        leaves = {"p": move(case.leaves["p"]), "h_0": only(case.leaves["h_0"], first)}
        alone = case._replace(
            leaves=case.leaves | leaves,
            lengths=lengths,
            grad_y=move(case.grad_y),
            grad_h_n=only(case.grad_h_n, 1 - first),
        )
        parts.append(run(alone, by_package(backend)))
    one, two = parts
    for name in ("y", "dp"):
        for b, start in enumerate(starts.tolist()):
            assert torch.equal(whole[name][:start, b], one[name][:start, b]), name
            assert torch.equal(whole[name][start:, b], two[name][: T - start, b]), name
    assert torch.equal(whole["h_n"], torch.stack([two["h_n"][0], one["h_n"][1]]))
    assert torch.equal(whole["dh_0"], torch.stack([one["dh_0"][0], two["dh_0"][1]]))
    if dtype == torch.float64:
        names = [n for n in whole if n in ("dw_hh", "dnorm_weight", "dnorm_bias")]
        assert_close({n: whole[n] for n in names}, {n: one[n] + two[n] for n in names})


@every_backend
@pytest.mark.parametrize("norm", [None, "bias"])
@pytest.mark.parametrize("f", NONLINEARITIES)
@pytest.mark.parametrize("where", ["p", "grad_y"])
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_do_not_cross_a_reset(backend, norm, f, where, special):
    T, B, H, cut = 6, 2, 4, 3
    case = make_case(T, B, H, norm=norm)._replace(nonlinearity=f)
    case = case._replace(reset=torch.zeros(T, B, dtype=torch.bool))
    case.reset[cut, 0] = True
    clean = run(case, by_package(backend))
    for t in (1, 4):  # in the first episode and in the second
        broken = {"p": case.leaves["p"].clone(), "grad_y": case.grad_y.clone()}
        broken[where][t, 0] = special
        leaves = case.leaves | {"p": broken["p"]}
        found = run(case._replace(leaves=leaves, grad_y=broken["grad_y"]), by_package(backend))
        sound = torch.ones(T, B, dtype=torch.bool)
        sound[cut if t >= cut else 0 : T if t >= cut else cut, 0] = False
        for name in ("y", "dp"):
            assert torch.equal(found[name][sound], clean[name][sound]), name
        changed = ~torch.isclose(found["dp"], clean["dp"], rtol=0, atol=0)
        assert changed[~sound].any(), "nothing happened at all"
