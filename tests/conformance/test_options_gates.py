"""Reset, lengths, bptt_window, clip_state_grad, num_heads and cell states of LSTM and GRU.

The judge is a loop over rows, heads and steps, written from the equations and not from the oracle.
PyTorch differentiates it in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import examples, needs_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rnnfast
from rnnfast import ops
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
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
GATES = {"lstm": 4, "gru": 3}
every_cell = pytest.mark.parametrize("cell", GATES)
Found = dict[str, Tensor]


class Case(NamedTuple):
    cell: str
    leaves: Found  # p [T, B, D * G * H], w_hh [D, G * H, S], and perhaps h_0, c_0 [D, B, H] (both
    #                or neither) and b_hn [D * H] of a GRU
    grads: Found  # of y [T, B, D * H], h_n [D, B, H], c_n and cells of an LSTM
    lengths: Tensor | None = None
    reset: Tensor | None = None
    heads: int = 1
    window: int | None = None
    clip: float | None = None

    @property
    def options(self) -> Options:
        D = len(self.leaves["w_hh"])
        limits = {"bptt_window": self.window, "clip_state_grad": self.clip}
        return Options(self.cell, D, self.heads, all_cells="cells" in self.grads, **limits)

    def changed(self, **leaves: Tensor) -> Case:
        return self._replace(leaves=self.leaves | leaves)


def make_case(cell: str, T: int, B: int, S: int, heads: int = 1, D: int = 2, seed: int = 0) -> Case:
    """No lengths, no reset; all leaves, and a gradient of every output."""
    generator = torch.Generator().manual_seed(seed)
    G, H = GATES[cell], heads * S

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"p": normal(T, B, D * G * H), "w_hh": normal(D, G * H, S) * 0.9 / S**0.5}
    leaves["h_0"] = normal(D, B, H)
    grads = {"y": normal(T, B, D * H), "h_n": normal(D, B, H)}
    if cell == "lstm":
        leaves["c_0"] = normal(D, B, H)
        grads |= {"c_n": normal(D, B, H), "cells": normal(T, B, D * H)}
    else:
        leaves["b_hn"] = normal(D * H)
    return Case(cell, leaves, grads, heads=heads)


@st.composite
def cases(draw) -> Case:
    T, B, D = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    S, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    case = make_case(draw(st.sampled_from(list(GATES))), T, B, S, heads, D, draw(st.integers(0, 9)))
    absent = {"h_0", "c_0"} if draw(st.booleans()) else set()
    absent |= {"b_hn"} if draw(st.booleans()) else set()
    used = draw(st.sets(st.sampled_from(list(case.grads)), min_size=1))
    rows = st.lists(st.integers(0, T), min_size=B, max_size=B)
    points = st.lists(st.booleans(), min_size=T * B, max_size=T * B)
    lengths, reset = draw(st.none() | rows), draw(st.none() | points)
    return case._replace(
        leaves={name: x for name, x in case.leaves.items() if name not in absent},
        grads={name: g for name, g in case.grads.items() if name in used},
        lengths=None if lengths is None else torch.tensor(lengths),
        reset=None if reset is None else torch.tensor(reset).view(T, B),
        window=draw(st.none() | st.integers(1, T + 1)),
        clip=draw(st.sampled_from([None, 0.05, 1.0, 1e6])),
    )


# ------------------------------------------------------------------------------ the definition


class Clipped(torch.autograd.Function):
    """The states of a step, whose joint gradient has a largest norm."""

    @staticmethod
    def forward(ctx, limit, *states):
        ctx.limit = limit
        return tuple(s.clone() for s in states)

    @staticmethod
    def backward(ctx, *grads):
        norm = torch.cat(grads).norm()
        if ctx.limit < norm < torch.inf:
            grads = [g * (ctx.limit / norm) for g in grads]
        return None, *grads


def lstm_step(a: Tensor, u: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (a + u).chunk(4)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def gru_step(a: Tensor, u: Tensor, states: list[Tensor]) -> list[Tensor]:
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3), u.chunk(3)
    r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
    return [(1 - z) * (a_n + r * u_n).tanh() + z * states[0]]


STEPS = {"lstm": lstm_step, "gru": gru_step}


def by_definition(case: Case) -> Found:
    """One row, direction, head and step after the other."""
    p, w_hh, G = case.leaves["p"], case.leaves["w_hh"], GATES[case.cell]
    (T, B, _), (D, rows, S) = p.shape, w_hh.shape
    H, names = rows // G, ("h", "c") if case.cell == "lstm" else ("h",)
    over_time = [[[[] for _ in range(B)] for _ in range(T)] for _ in names]
    lasts = [[[[] for _ in range(B)] for _ in range(D)] for _ in names]
    for b in range(B):
        length = T if case.lengths is None else int(case.lengths[b])
        for d in range(D):
            for k in range(case.heads):
                units = torch.arange(k * S, (k + 1) * S)
                of_gates = torch.cat([g * H + units for g in range(G)])
                states = [
                    case.leaves[f"{n}_0"][d, b, units] if "h_0" in case.leaves else p.new_zeros(S)
                    for n in names
                ]
                bias = p.new_zeros(G * S)
                if "b_hn" in case.leaves:
                    bias = torch.cat([bias[: 2 * S], case.leaves["b_hn"][d * H + units]])
                steps = list(range(length))
                for t in steps[::-1] if d else steps:
                    edge = t + 1 if d else t  # crossed on the way into this step
                    if case.reset is not None and edge < length and case.reset[edge, b]:
                        states = [p.new_zeros(S) for _ in names]
                    if case.window and 0 < edge < length and edge % case.window == 0:
                        states = [s.detach() for s in states]
                    u = w_hh[d, of_gates] @ states[0] + bias
                    states = STEPS[case.cell](p[t, b, d * G * H + of_gates], u, states)
                    if case.clip is not None:
                        states = list(Clipped.apply(case.clip, *states))
                    for j, s in enumerate(states):
                        over_time[j][t][b].append(s)
                for j, s in enumerate(states):
                    lasts[j][d][b].append(s)
                    for t in range(length, T):
                        over_time[j][t][b].append(p.new_zeros(S))

    def whole(parts: list) -> Tensor:
        return torch.stack([torch.stack([torch.cat(units) for units in rows]) for rows in parts])

    found = dict(zip(("y", "cells"), map(whole, over_time)))
    return found | {f"{n}_n": whole(last) for n, last in zip(names, lasts)}


# ------------------------------------------------------------------------ and its competitors


def by_package(backend: str):
    def call(case: Case) -> Found:
        leaves = dict(case.leaves)
        p, w_hh, h_0, c_0 = (leaves.pop(name, None) for name in ("p", "w_hh", "h_0", "c_0"))
        common = {"lengths": case.lengths, "reset": case.reset, "num_heads": case.heads}
        common |= {"bptt_window": case.window, "clip_state_grad": case.clip, "backend": backend}
        if case.cell == "gru":
            return dict(zip(("y", "h_n"), rnnfast.functional.gru(p, w_hh, h_0, **leaves, **common)))
        hx = None if h_0 is None else (h_0, c_0)
        found = rnnfast.functional.lstm(p, w_hh, hx, return_cell_states=True, **common)
        return {"y": found[0], "h_n": found[1][0], "c_n": found[1][1], "cells": found[2]}

    return call


def grouped(case: Case) -> tuple[Tensor, Weights, States, Rows]:
    p, w_hh, h_0, c_0, b_hn = (case.leaves.get(n) for n in ("p", "w_hh", "h_0", "c_0", "b_hn"))
    b_hh = None
    if b_hn is not None:
        b_hn = b_hn.view(len(w_hh), 1, -1)
        b_hh = torch.cat([torch.zeros_like(b_hn)] * 2 + [b_hn], 1).flatten()
    weights = Weights(None, None, b_hh, w_hh.flatten(0, 1))
    return p, weights, States(h_0, c_0), Rows(case.lengths, case.reset)


def by_function(case: Case) -> Found:
    """The oracle inside the Function that kernels are called by, which a record asks for."""
    p, *groups = grouped(case)
    buffer = record.make(record.numbers(len(case.leaves["w_hh"]), p.shape[0], 1), p.device)
    options = case.options._replace(all_cells=case.cell == "lstm")
    y, last, cells = ops.layer(p, *groups, buffer, options, "reference")
    found = {"y": y, "h_n": last.h, "c_n": last.c, "cells": cells}
    return {name: x for name, x in found.items() if x is not None}


CALLS = [
    pytest.param(by_package("cpu"), marks=needs_cpu, id="cpu"),
    pytest.param(by_package("reference"), id="reference"),
    pytest.param(by_function, id="reference-as-a-kernel"),
]


def run(case: Case, call) -> Found:
    """The outputs, and a gradient d... of each leaf."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.leaves.items()}
    found = call(case._replace(leaves=leaves))
    # where no row has a step, the loop has nothing to differentiate
    pairs = [(found[name], g) for name, g in case.grads.items() if found[name].requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves.values()]
    if pairs:
        outputs, gs = zip(*pairs)
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(outputs, list(leaves.values()), gs, **options)
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients)}


def assert_close(found: Found, wanted: Found) -> None:
    """float64, to rounding: 1e-12 of the largest entry, of each step where there are steps."""
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        value = found[name]
        assert value.shape == exact.shape, name
        assert value.dtype == exact.dtype == torch.float64, name
        pairs = zip(value, exact) if name in ("y", "cells", "dp") else [(value, exact)]
        for t, (v, e) in enumerate(pairs):
            error = (v - e).abs().max().item()
            assert error <= 1e-12 * e.abs().max().item(), f"{name}[{t}]: error {error}"


# -------------------------------------------------------------------------- against the loop


@pytest.mark.parametrize("call", CALLS)
def test_any_mix_of_options_agrees_with_the_definition(call):
    @settings(max_examples=examples(120))
    @given(case=cases())
    def check(case):
        assert_close(run(case, call), run(case, by_definition))

    check()


def busy_case(cell: str) -> Case:
    """Every option does something in it."""
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[[0, 3, 2, 5], [0, 0, 2, 2]] = True
    case = make_case(cell, 7, 3, 4, heads=2, seed=5)
    return case._replace(lengths=torch.tensor([7, 0, 5]), reset=reset, window=3, clip=1.5)


FORGOTTEN = {
    "lengths": lambda c: c._replace(lengths=None),
    "reset": lambda c: c._replace(reset=None),
    "the step of a reset": lambda c: c._replace(reset=c.reset.roll(1, 0)),
    "window": lambda c: c._replace(window=None),
    "clip": lambda c: c._replace(clip=None),
    "heads": lambda c: c.changed(w_hh=c.leaves["w_hh"].roll(4, 1)),
    "h_0": lambda c: c.changed(h_0=c.leaves["h_0"] * 0),
    "c_0": lambda c: c.changed(c_0=c.leaves["c_0"] * 0),
    "b_hn": lambda c: c.changed(b_hn=c.leaves["b_hn"] * 0),
    "grad of y": lambda c: c._replace(grads=c.grads | {"y": c.grads["y"] * 0}),
    "grad of c_n": lambda c: c._replace(grads=c.grads | {"c_n": c.grads["c_n"] * 0}),
    "grad of cells": lambda c: c._replace(grads=c.grads | {"cells": c.grads["cells"] * 0}),
}
OF_ONE = {"c_0": "lstm", "grad of c_n": "lstm", "grad of cells": "lstm", "b_hn": "gru"}


@pytest.mark.parametrize(
    ("cell", "option"),
    [(cell, option) for cell in GATES for option in FORGOTTEN if OF_ONE.get(option, cell) == cell],
)
def test_the_comparison_finds_an_option_forgotten(cell, option):
    case = busy_case(cell)
    found = run(FORGOTTEN[option](case), by_package("reference"))
    with pytest.raises(AssertionError, match="error"):
        assert_close(found, run(case, by_definition))


@every_backend
@every_cell
def test_resets_beyond_the_length_do_nothing(cell, backend):
    case = busy_case(cell)
    beyond = torch.arange(7).unsqueeze(1) >= case.lengths
    more = case._replace(reset=case.reset | beyond)
    fewer = case._replace(reset=case.reset & ~beyond)
    found, wanted = run(more, by_package(backend)), run(fewer, by_package(backend))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@every_backend
@every_cell
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_beyond_the_length_do_nothing(special, cell, backend):
    case = busy_case(cell)
    beyond = (torch.arange(7).unsqueeze(1) >= case.lengths).unsqueeze(2)
    grads = {
        name: g.masked_fill(beyond, special) if len(g) == 7 else g for name, g in case.grads.items()
    }
    broken = case.changed(p=case.leaves["p"].masked_fill(beyond, special))._replace(grads=grads)
    found, wanted = run(broken, by_package(backend)), run(case, by_package(backend))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@settings(max_examples=examples(120))
@given(case=cases(), of_saved=st.booleans())
def test_the_formula_of_backward_is_the_derivative_of_forward(case, of_saved):
    """Also of the values that the cell saves, which a second derivative asks for."""
    case = case._replace(leaves={n: x.detach().requires_grad_() for n, x in case.leaves.items()})
    p, weights, states, rows = grouped(case)
    y, last, saved, cells = loop.forward(p, weights, states, rows, case.options)
    outputs = {"y": y, "h_n": last.h, "c_n": last.c, "cells": cells}
    pairs = [(outputs[name], g) for name, g in case.grads.items()]
    of_values = torch.randn_like(saved.cell_values) if of_saved else None
    if of_saved:
        pairs.append((saved.cell_values, of_values))
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    if not pairs:
        return
    xs, gs = zip(*pairs)
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(xs, list(case.leaves.values()), gs, **options)
    g = case.grads
    with torch.no_grad():
        given = OutputGradients(g.get("y"), States(g.get("h_n"), g.get("c_n")), g.get("cells"))
        kept = Kept(None, y, weights, states, rows, saved)
        found = loop.backward(given, kept, case.options, grad_saved=Saved(of_values))
    by_name = {"p": found.p, "w_hh": found.weights.w_hh.view_as(case.leaves["w_hh"])}
    by_name |= {"h_0": found.states.h, "c_0": found.states.c}
    if "b_hn" in case.leaves:
        by_name["b_hn"] = found.weights.b_hh.view(len(case.leaves["w_hh"]), 3, -1)[:, 2].flatten()
    assert_close(
        {f"d{name}": by_name[name] for name in case.leaves},
        {f"d{name}": g for name, g in zip(case.leaves, wanted)},
    )


# --------------------------------------------------------------------- derivatives of other kinds


def derivable_case(cell: str, D: int) -> Case:
    """No window and no clip: a gradient with them is no derivative."""
    reset = torch.tensor([[True, False], [False, True], [True, True]])
    case = make_case(cell, 3, 2, 2, 2, D, seed=3)
    return case._replace(lengths=torch.tensor([3, 2]), reset=reset)


@pytest.mark.parametrize("call", CALLS)
@every_cell
@pytest.mark.parametrize("D", [1, 2])
def test_first_second_and_forward_derivatives(call, cell, D):
    case = derivable_case(cell, D)
    names = list(case.leaves)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(case._replace(leaves=dict(zip(names, values)))).values())

    inputs = [x.requires_grad_() for x in case.leaves.values()]
    # one random direction instead of each element in turn
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def second_order(case: Case, call) -> Found:
    """Gradients of the squared norm of the gradient."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.leaves.items()}
    loss = sum((x**3).sum() for x in call(case._replace(leaves=leaves)).values())
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    value = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(value, list(leaves.values()))
    return {f"d{name}": g for name, g in zip(leaves, second)}


LIMITS = [{}, {"window": 2}, {"window": 1}, {"clip": 0.8}, {"window": 3, "clip": 0.8}]


@pytest.mark.parametrize("call", CALLS)
@every_cell
@pytest.mark.parametrize("changed", LIMITS)
def test_second_order_gradients_agree_with_the_definition(call, cell, changed):
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    case = make_case(cell, 6, 2, 4, heads=2, seed=4)._replace(reset=reset, **changed)
    case = case._replace(lengths=torch.tensor([6, 4]))
    assert_close(second_order(case, call), second_order(case, by_definition))


@every_cell
def test_a_window_and_a_limit_change_second_order_gradients(cell):
    """Otherwise the test above would show nothing."""
    case = make_case(cell, 6, 2, 4)
    plain = second_order(case, by_definition)
    for changed in ({"window": 2}, {"clip": 0.8}):
        found = second_order(case._replace(**changed), by_definition)
        assert all(not torch.allclose(found[name], plain[name]) for name in ("dp", "dw_hh"))


ONE_ROW = ("p", "h_0", "c_0")  # leaves with an axis of the batch


@every_backend
@every_cell
@pytest.mark.parametrize("changed", [{}, {"window": 2}, {"clip": 0.8}])
def test_vmap_over_the_batch(changed, cell, backend):
    case = make_case(cell, 5, 3, 4, heads=2)._replace(**changed)
    case = case._replace(reset=torch.zeros(5, 3, dtype=torch.bool))
    case.reset[2, 1] = True

    def call(case: Case) -> Found:
        def one(leaves: Found, reset: Tensor) -> Found:
            rows = {name: x.unsqueeze(1) for name, x in leaves.items()}
            found = by_package(backend)(case.changed(**rows)._replace(reset=reset.unsqueeze(1)))
            return {name: x.squeeze(1) for name, x in found.items()}

        rows = {name: x for name, x in case.leaves.items() if name in ONE_ROW}
        return torch.vmap(one, in_dims=1, out_dims=1)(rows, case.reset)

    assert_close(run(case, call), run(case, by_package(backend)))


@every_backend
@every_cell
def test_gradients_per_sample(cell, backend):
    case = make_case(cell, 5, 3, 4, heads=2)._replace(clip=0.8, window=3)
    weights = {name: x for name, x in case.leaves.items() if name not in ONE_ROW}

    def loss(weights: Found, p: Tensor) -> Tensor:
        leaves = weights | {"p": p.unsqueeze(1)}
        found = by_package(backend)(case._replace(leaves=leaves))
        return sum(x.square().sum() for x in found.values())

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, case.leaves["p"])
    for b in range(3):
        leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
        value = loss(leaves, case.leaves["p"][:, b])
        wanted = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
        assert_close({name: x[b] for name, x in found.items()}, wanted)


@every_backend
@every_cell
@pytest.mark.parametrize("changed", [{}, {"clip": 0.8}, {"window": 2}])
def test_a_jvp_is_the_transpose_of_the_gradient(changed, cell, backend):
    """A window stops tangents, too; a limit is of the way back alone."""
    case = busy_case(cell)._replace(**({"window": None, "clip": None} | changed))
    names, values = zip(*case.leaves.items())
    tangents = tuple(torch.randn_like(x) for x in values)

    def function(*values: Tensor) -> Found:
        return by_package(backend)(case._replace(leaves=dict(zip(names, values))))

    _, outputs = torch.func.jvp(function, values, tangents)
    gradients = run(case._replace(clip=None), by_definition)
    left = sum((outputs[name] * g).sum() for name, g in case.grads.items())
    terms = torch.stack([(gradients[f"d{n}"] * v).sum() for n, v in zip(names, tangents)])
    assert (left - terms.sum()).abs() <= 1e-12 * terms.abs().sum()


# ------------------------------------------------------------------------- what is not finite


@every_backend
@every_cell
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_not_scaled(special, cell, backend):
    """That of its head and row alone; the rest is."""
    case = make_case(cell, 1, 2, 3, heads=2, D=1)._replace(clip=0.5)
    grads = case.grads | {"y": case.grads["y"].clone()}
    grads["y"][0, 1, 4] = special
    broken = case._replace(grads=grads)

    def dp(case: Case) -> Tensor:  # [B, G, H]
        return run(case, by_package(backend))["dp"][0].unflatten(1, (-1, 6))

    found, whole, clipped = dp(broken), dp(broken._replace(clip=None)), dp(case)
    assert not torch.equal(whole[0], clipped[0])
    assert torch.equal(found[0], clipped[0])
    assert torch.equal(found[1, :, :3], clipped[1, :, :3])
    assert torch.equal(found[1][:, [3, 5]], whole[1][:, [3, 5]])
    assert torch.equal(found[1, :, 4].isfinite(), whole[1, :, 4].isfinite())
    assert not found[1, :, 4].isfinite().any()


@every_backend
@pytest.mark.parametrize(
    ("cell", "where"),
    [("lstm", "p"), ("lstm", "y"), ("lstm", "cells"), ("gru", "p"), ("gru", "y")],
)
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_do_not_cross_a_reset(special, where, cell, backend):
    T, cut = 6, 3
    case = make_case(cell, T, 2, 4)
    case = case._replace(reset=torch.zeros(T, 2, dtype=torch.bool))
    case.reset[cut, 0] = True
    clean = run(case, by_package(backend))
    for t in (1, 4):  # in the first episode and in the second
        leaves, grads = ({n: x.clone() for n, x in d.items()} for d in (case.leaves, case.grads))
        (leaves if where == "p" else grads)[where][t, 0] = special
        found = run(case._replace(leaves=leaves, grads=grads), by_package(backend))
        sound = torch.ones(T, 2, dtype=torch.bool)
        sound[cut if t >= cut else 0 : T if t >= cut else cut, 0] = False
        for name in {"y", "cells", "dp"} & found.keys():
            assert torch.equal(found[name][sound], clean[name][sound]), name
        changed = ~torch.isclose(found["dp"], clean["dp"], rtol=0, atol=0)
        assert changed[~sound].any(), "nothing happened at all"


@every_backend
@every_cell
def test_two_episodes_in_a_row_give_what_each_gives_alone(cell, backend):
    """Bit for bit; sums over time, which are added up in another order, to rounding."""
    T, B = 9, 3
    starts = torch.tensor([2, 5, 8])  # of the second episode of each row
    case = make_case(cell, T, B, 4)
    whole = run(case._replace(reset=torch.arange(T).unsqueeze(1) == starts), by_package(backend))
    at = (torch.arange(T).unsqueeze(1) + starts).clamp(max=T - 1)

    def part(lengths: Tensor, first: int, shift: bool) -> Found:
        """An episode, which direction ``first`` runs before the other one."""

        def move(x: Tensor) -> Tensor:
            if len(x) == 2:
                return x
            return x.gather(0, at.unsqueeze(2).expand_as(x)) if shift else x

        def only(x: Tensor, d: int) -> Tensor:
            return torch.stack([v if i == d else torch.zeros_like(v) for i, v in enumerate(x)])

        leaves = {n: only(x, first) for n, x in case.leaves.items() if n in ("h_0", "c_0")}
        grads = {n: only(g, 1 - first) if len(g) == 2 else move(g) for n, g in case.grads.items()}
        alone = case.changed(p=move(case.leaves["p"]), **leaves)
        return run(alone._replace(lengths=lengths, grads=grads), by_package(backend))

    one, two = part(starts, 0, False), part(T - starts, 1, True)
    for name in {"y", "cells", "dp"} & whole.keys():
        for b, start in enumerate(starts.tolist()):
            assert torch.equal(whole[name][:start, b], one[name][:start, b]), name
            assert torch.equal(whole[name][start:, b], two[name][: T - start, b]), name
    for state in ("h", "c") if cell == "lstm" else ("h",):
        last, first = f"{state}_n", f"d{state}_0"
        assert torch.equal(whole[last], torch.stack([two[last][0], one[last][1]]))
        assert torch.equal(whole[first], torch.stack([one[first][0], two[first][1]]))
    names = [name for name in whole if name in ("dw_hh", "db_hn")]
    assert_close({n: whole[n] for n in names}, {n: one[n] + two[n] for n in names})
