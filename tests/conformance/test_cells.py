"""A cell is a plug-in: the eager loops run cells with gates, several states, a recurrent part of
their own, a parameter, and an output that is no state, without knowing any of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from rnnfast.backends import reference
from rnnfast.cells import CELLS
from rnnfast.cells.cell import Cell, StepGradients
from rnnfast.recurrence import loop
from rnnfast.recurrence.groups import (
    Kept,
    Options,
    OutputGradients,
    Rows,
    Saved,
    States,
    Wanted,
    Weights,
)
from rnnfast.recurrence.record import FIELDS

T, B, S = 6, 3, 5
EXACT = torch.float64


def leaky_step(a, u, before, parameters):
    """v' = (1 - leak) v + leak a, with tanh(v) put out (the current form)."""
    (leak,) = parameters
    v = before[0] + leak * (a[0] - before[0])
    return (v,), (a[0] - before[0],)


def leaky_step_back(grads, before, y, saved, a, parameters):
    (dv,), (leak,) = grads, parameters
    dleak = dv * saved[0]
    return StepGradients((leak * dv)[None], direct=((1 - leak) * dv,), parameters=(dleak,))


def leaky_saved_back(grads, saved):
    return StepGradients(
        grads[0][None], direct=(-grads[0],), parameters=(torch.zeros_like(grads[0]),)
    )


LEAKY = Cell(
    name="test_leaky",
    gates=("a",),
    states=("h",),
    step=leaky_step,
    step_back=leaky_step_back,
    gain=lambda y, saved: 1 - y * y,
    saved=("a - v",),
    saved_back=leaky_saved_back,
    parameters=("leak",),
    emit=lambda states: states[0].tanh(),
    emit_back=lambda grad, y: grad * (1 - y * y),
    states_before=lambda y, saved: (),  # step_back has all it needs
)

NEW = {LEAKY.name: LEAKY}
EVERY = [*CELLS, *NEW]


@pytest.fixture(autouse=True)
def _new_cells(monkeypatch):
    for name, cell in NEW.items():
        monkeypatch.setitem(CELLS, name, cell)


def make(name: str, D: int, heads: int, norm: bool) -> tuple[dict[str, Tensor], Options]:
    """Leaves of a layer, by name."""
    cell, H = CELLS[name], heads * S
    G = len(cell.gates)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=EXACT)

    leaves = {"p": normal(T, B, D * G * H), "w_hh": normal(D * G * H, S) * 0.5}
    if cell.apart:
        leaves["b_hh"] = normal(D * G * H)
    if norm:
        leaves |= {"gamma": normal(D * G * H), "beta": normal(D * G * H)}
    if cell.parameters:
        leaves["cell_parameters"] = torch.rand(D, len(cell.parameters), H, dtype=EXACT)
    leaves |= {state: normal(D, B, H) for state in cell.states}
    return leaves, Options(name, D, heads)


def grouped(leaves: dict[str, Tensor]) -> tuple[Weights, States]:
    weights = Weights(None, None, leaves.get("b_hh"), leaves["w_hh"])
    named = {n: leaves.get(n) for n in ("gamma", "beta", "cell_parameters")}
    return weights._replace(**named), States(leaves.get("h"), leaves.get("c"))


def rows_of(kind: str) -> Rows:
    lengths = torch.tensor([T, 0, 3]) if kind == "lengths" else None
    reset = torch.rand(T, B) < 0.4 if kind == "reset" else None
    return Rows(lengths, reset)


SETTINGS = {
    "plain": {},
    "window": {"bptt_window": 2},
    "clip": {"clip_state_grad": 0.4},
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("D", "heads", "norm"), [(1, 1, False), (2, 2, False), (2, 2, True)])
@pytest.mark.parametrize("kind", ["plain", "lengths", "reset"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_backward_is_the_derivative_of_forward(name, D, heads, norm, kind, setting):
    leaves, options = make(name, D, heads, norm)
    options, rows = options._replace(**SETTINGS[setting]), rows_of(kind)
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    weights, states = grouped(leaves)
    y, lasts, saved, _ = loop.forward(leaves["p"], weights, states, rows, options)
    outputs = [y, *(s for s in lasts if s is not None)]
    grads = [torch.randn_like(x) for x in outputs]
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    with torch.no_grad():
        given = OutputGradients(grads[0], States(*grads[1:]))
        kept = Kept(None, y, weights, states, rows, saved)
        found = loop.backward(given, kept, options)
    by_name = {"p": found.p} | found.weights._asdict() | found.states._asdict()
    for leaf, gradient in zip(leaves, wanted):
        torch.testing.assert_close(by_name[leaf], gradient, rtol=1e-10, atol=1e-10, msg=leaf)


@pytest.mark.parametrize(("name", "twin"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
@pytest.mark.parametrize("D", [1, 2])
def test_gated_cells_are_those_of_torch(name, twin, D):
    """A whole layer of the reference: results, and the gradients of all weights and states."""
    theirs = twin(4, S, bidirectional=D == 2, dtype=EXACT)
    suffixes = ["", "_reverse"][:D]
    kinds = ("weight_ih", "bias_ih", "bias_hh", "weight_hh")
    own = [[getattr(theirs, f"{kind}_l0{suffix}") for suffix in suffixes] for kind in kinds]
    x = torch.randn(T, B, 4, dtype=EXACT, requires_grad=True)
    states = [torch.randn(D, B, S, dtype=EXACT, requires_grad=True) for _ in CELLS[name].states]
    y, lasts = theirs(x, tuple(states) if len(states) > 1 else states[0])
    outputs = [y, *(lasts if isinstance(lasts, tuple) else (lasts,))]
    grads = [torch.randn_like(output) for output in outputs]
    leaves = [x, *(w for ws in own for w in ws), *states]
    dx, *others = torch.autograd.grad(outputs, leaves, grads)
    with torch.no_grad():
        weights = Weights(*map(torch.cat, own))
        inputs = x, weights, States(*states), Rows()
        found = reference.forward(*inputs, Options(name, D))
        kept = Kept(x, found.y, *inputs[1:], found.saved)
        given = OutputGradients(grads[0], States(*grads[1:]))
        gradients = reference.backward(given, kept, None, Wanted(), Options(name, D))
    torch.testing.assert_close([found.y, *found.states[: len(states)]], outputs)
    torch.testing.assert_close(gradients.x, dx)
    parts = [g for w in gradients.weights[:4] for g in w.chunk(D)]
    torch.testing.assert_close([*parts, *gradients.states[: len(states)]], others)


def test_a_leak_of_one_is_the_rnn():
    leaves, _ = make("test_leaky", 2, 1, False)
    leaves["cell_parameters"] = torch.ones_like(leaves["cell_parameters"])
    weights, states = grouped(leaves)
    y, last, _, _ = loop.forward(leaves["p"], weights, states, Rows(), Options("test_leaky", 2))
    plain = weights._replace(cell_parameters=None), States(states.h.tanh()), Rows()
    wanted, (h_n, _), _, _ = loop.forward(leaves["p"], *plain, Options("rnn_tanh", 2))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(last.h.tanh(), h_n)


@pytest.mark.parametrize("name", EVERY)
def test_the_record_has_the_gradients_that_hooks_see(name):
    """The joint gradient of all states, at every step of both directions."""
    leaves, options = make(name, 1, 1, False)
    weights, states = grouped(leaves)
    cell = CELLS[name]
    group = loop._Direction(0, weights, options)
    now, seen, emitted = group.first(leaves["p"], states), [], []
    for t in range(T):
        a, u, _, _ = group.preactivations(group.of_gates(leaves["p"][t]), cell.emit(now))
        now, _ = cell.step(a, u, now, group.parameters)
        # Nodes of their own: the gradient of one state is taken at fixed others.
        now = tuple(s.detach().requires_grad_() if t == 0 else s * 1 for s in now)
        for s in now:
            s.retain_grad()
        seen.append(now)
        emitted.append(cell.emit(now))
    g = torch.randn(T, 1, B, S, dtype=EXACT)
    (torch.stack(emitted) * g).sum().backward()
    y, _, saved, _ = loop.forward(leaves["p"], weights, states, Rows(), options)
    record = torch.empty(1, T, B, len(FIELDS), dtype=EXACT)
    given = OutputGradients(g[:, 0], States())
    loop.backward(given, Kept(None, y, weights, states, Rows(), saved), options, record)
    for t, now in enumerate(seen):
        grads = [torch.zeros(1, B, S, dtype=EXACT) if s.grad is None else s.grad for s in now]
        wanted = sum(x.square().sum((0, 2)) for x in grads)
        torch.testing.assert_close(record[0, t, :, FIELDS.index("state_squares")], wanted)


def test_every_cell_says_what_it_saves():
    for name, cell in CELLS.items():
        leaves, options = make(name, 2, 1, False)
        weights, states = grouped(leaves)
        saved = loop.forward(leaves["p"], weights, states, Rows(), options).saved
        width = 2 * len(cell.saved) * S
        assert saved == Saved() if not cell.saved else saved.cell_values.shape == (T, B, width)
        assert all(state in States._fields for state in itertools.chain(cell.states))
