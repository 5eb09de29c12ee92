"""The judge of a cell that saves values: gates, several states, a direct way back.

Each step is taken again in float64 from the kernel's own states and saved values, by the cell's
own ``step`` and ``step_back`` on numbers that carry their error bound (:mod:`.tracked`). A kernel
does not put out the gradients that go straight through a step (dc of an LSTM, z dh of a GRU): they
are carried along the steps, with their bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Kept, Options, OutputGradients, Results, Rows, States, Weights
from ..recurrence.loop import RecurrenceGradients
from ..recurrence.precision import arithmetic
from ..recurrence.record import FIELDS
from .case import Case, Verdict, clips, exact, pick, verdict
from .case import clip as clip_value
from .tracked import Tracked

NAMES = States._fields


class Gates:
    """The tensors of a cell with gates, by group (direction and head): values of gates and saved
    values are [k, G, T, B, S]."""

    def __init__(self, kept: Kept, options: Options, u_operand: float | None) -> None:
        self.case = Case(kept, options, u_operand)
        self.kept, self.options, self.cell = kept, options, self.case.cell
        self.D, self.n, self.S = self.case.D, self.case.heads, self.case.S
        self.u, self.u_store = self.case.u_operand, self.case.u_store
        self.saved = self.of_saved(kept.saved.cell_values).unbind()
        T, B = kept.y.shape[:2]
        c = kept.states.c
        zeros = torch.zeros(self.D, B, self.n * self.S)
        self.first = (self.case.h_0, self.case.states_by_group(zeros if c is None else c))
        # A state that is carried in more bits than it is stored in.
        narrow = kept.y.dtype != arithmetic(kept.y.dtype)
        before = self.cell.states_before(self.case.before, self.saved)
        of_state = self.u_store if narrow else 0.0
        self.states = tuple(Tracked(s, of_state * s.abs(), self.u) for s in before)
        self.shape = len(self.cell.gates), self.D * self.n, T, B, self.S

    def of_gates(self, x: Tensor) -> Tensor:
        """[T, B, D * k * n * S] -> [k, G, T, B, S] in float64."""
        T, B, _ = x.shape
        x = exact(x).view(T, B, self.D, -1, self.n, self.S)
        return x.permute(3, 2, 4, 0, 1, 5).flatten(1, 2)

    def of_saved(self, x: Tensor) -> Tensor:
        """[T, B, D * n * k * S] -> [k, G, T, B, S] in float64."""
        T, B, _ = x.shape
        x = exact(x).view(T, B, self.D, self.n, -1, self.S)
        return x.permute(4, 2, 3, 0, 1, 5).flatten(1, 2)

    def gates_in_time(self, x: Tensor) -> Tensor:
        """[k, G, T, B, S] -> [T, B, D * k * n * S], the steps that rows do not have as 0."""
        x = self.case.masked(x).unflatten(1, (self.D, self.n))
        return x.permute(3, 4, 1, 0, 2, 5).flatten(2)

    def bias(self) -> Tensor:
        """b_hh of the gates apart, [k, G, 1, 1, S]; 0 for the others, whose bias is in p."""
        b, k = self.kept.weights.b_hh, len(self.cell.gates)
        b = torch.zeros(self.D * k * self.n * self.S) if b is None else b
        by_gate = exact(b).view(self.D, k, self.n, self.S).transpose(0, 1).flatten(1, 2)
        return torch.where(self.inside, by_gate[:, :, None, None], 0)

    @property
    def inside(self) -> Tensor:
        """bool [k, 1, 1, 1, 1]: the gates apart."""
        kinds = [gate in self.cell.apart for gate in self.cell.gates]
        return torch.tensor(kinds).view(-1, 1, 1, 1, 1)

    def products(self, before: Tensor, transposed: bool = False) -> Tensor:
        """W_hh of every gate times [G, T, B, S]; transposed: sum over gates of x [k, G, T, B, S]
        times W_hh."""
        if transposed:
            return torch.einsum("kgtbj,kgji->gtbi", before, self.case.w_gates)
        return torch.einsum("gtbj,kgij->kgtbi", before, self.case.w_gates)


def judge_forward(
    p: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
    results: Results,
    u_operand: float | None,
    of_p: Tensor | None,
) -> list[Verdict]:
    y, last, saved, cells = results
    run = Gates(Kept(None, y, weights, states, rows, saved), options, u_operand)
    case, cell = run.case, run.cell
    bias, p = run.bias(), run.of_gates(p)
    u = run.products(case.before) + bias
    sizes = torch.einsum("gtbj,kgij->kgtbi", case.before.abs(), case.w_gates.abs()) + bias.abs()
    of_u, of_a = (case.error(terms, case.S) for terms in (sizes, sizes + p.abs()))
    a = torch.where(run.inside, p, p + u)
    of_a = torch.where(run.inside, 0, of_a)
    if of_p is not None:
        of_a = of_a + run.of_gates(of_p)
    new, values = cell.step(Tracked(a, of_a, run.u), Tracked(u, of_u, run.u), run.states, ())
    verdicts = [verdict("y", y, *map(case.steps, new[0].plain()))]
    wanted = torch.where(case.empty, case.h_0, pick(case.y, case.last))
    verdicts.append(verdict("h_n", last.h, case.states(wanted), None))
    stored = torch.stack([v.value for v in values]), torch.stack([v.error for v in values])
    by_name = zip(cell.saved, run.of_saved(saved.cell_values), *stored)
    for name, value, wanted, error in by_name:
        found = case.steps(value).to(y.dtype)
        verdicts.append(verdict(f"saved {name}", found, *map(case.steps, (wanted, error))))
    for j, state in enumerate(cell.states[1:], 1):
        verdicts += _beside(run, j, state, new[j], getattr(last, state), cells)
    return verdicts


def _beside(
    run: Gates, j: int, name: str, new: Tracked, last: Tensor, cells: Tensor | None
) -> list[Verdict]:
    """A state that y does not hold: where a step read it, after the last step, and of all steps."""
    case, dtype = run.case, run.kept.y.dtype
    firsts = run.first[j], torch.zeros_like(run.first[j])
    read, ends = [], []
    for of_step, first in zip(new.plain(), firsts):
        before = torch.where(case.at(case.first), first.unsqueeze(1), case.shifted(of_step, 1))
        read.append(case.steps(torch.where(case.drops, 0, before)))
        ends.append(case.states(torch.where(case.empty, first, pick(of_step, case.last))))
    verdicts = [
        verdict(f"{name} before", case.steps(run.states[j].value).to(dtype), *read),
        verdict(f"{name}_n", last, *ends),
    ]
    if cells is not None:
        verdicts.append(verdict("cells", cells, *map(case.steps, new.plain())))
    return verdicts


class _Step(NamedTuple):
    """Gradients of one step of all groups, [G, B, S] each; of gates [k, G, B, S]."""

    carries: tuple[Tracked, ...]  # of the states, from the step after
    grads: tuple[Tracked, ...]  # with what comes from outside
    clipped: tuple[Tracked, ...]
    dp: Tracked
    du: Tracked
    total: Tracked | None


class _Backward:
    """BPTT from the kernel's dp, step by step in the order of each direction."""

    def __init__(self, run: Gates, given: OutputGradients, dp: Tensor) -> None:
        self.run, self.given, case = run, given, run.case
        self.dp = self.turned(run.of_gates(dp))
        self.y, self.valid, self.ends, self.stops = (
            self.turned(x.expand(case.G, *x.shape[1:]))
            for x in (case.y, case.valid, case.at(case.last), case.stops)
        )
        self.saved = [self.turned(x) for x in run.saved]
        self.states = [Tracked(*map(self.turned, s.plain()), run.u) for s in run.states]
        zeros = torch.zeros_like(case.y)
        of_steps = [given.y, given.cells]
        self.outside = [self.turned(zeros if g is None else case.by_group(g)) for g in of_steps][
            : len(run.cell.states)
        ]
        self.last = [
            torch.zeros_like(case.h_0) if g is None else case.states_by_group(g)
            for g in list(given.states)[: len(run.cell.states)]
        ]

    def turned(self, x: Tensor) -> Tensor:
        """Time backwards for the groups of direction 1: [..., G, T, B, S]."""
        n = self.run.n
        axis = x.dim() - 4
        forward, reverse = x.narrow(axis, 0, n), x.narrow(axis, n, x.shape[axis] - n)
        return torch.cat([forward, reverse.flip(axis + 1)], axis)

    def steps(self) -> tuple[list[_Step], tuple[Tracked, ...]]:
        """All steps, in turned time, and the gradients of the first states."""
        run, T = self.run, self.y.shape[1]
        carries = tuple(Tracked(torch.zeros_like(x), 0.0, run.u) for x in self.last)
        found: list[_Step] = []
        for s in reversed(range(T)):
            step, carries = self.step(s, carries)
            found.append(step)
        return found[::-1], carries

    def step(self, s: int, carries: tuple[Tracked, ...]) -> tuple[_Step, tuple[Tracked, ...]]:
        run, cell = self.run, self.run.cell
        valid, ends = self.valid[:, s], self.ends[:, s]
        stops = self.stops[:, s] | ends
        carries = tuple(_where(stops & valid, 0, c) for c in carries)
        grads = tuple(
            c + Tracked(g[:, s], 0.0, run.u) + Tracked(torch.where(ends, last, 0), 0.0, run.u)
            for c, g, last in zip(carries, self.outside, self.last)
        )
        limit = run.options.clip_state_grad
        clipped = grads if limit is None else _clipped(grads, limit)
        saved = tuple(Tracked(x[:, s], 0.0, run.u) for x in self.saved)
        before = tuple(x[:, s] for x in self.states)
        found = cell.step_back(clipped, before, self.y[:, s], saved, None, ())
        dp = found.da
        du = dp if found.du is None else found.du
        step = _Step(carries, grads, clipped, dp, du, found.total)
        # The factor of the product is the kernel's dp; for a gate apart its du, which is stored.
        rounded = self.dp[:, :, s]
        mine = Tracked(du.value, du.error + run.u_store * du.value.abs(), run.u)
        inside = run.inside[..., 0]
        factor = torch.where(inside, mine.value, rounded)
        of_factor = torch.where(inside, mine.error, 0)
        if limit is not None:  # a kernel may clip before it multiplies, or the product
            joint = [torch.cat(v, -1) for v in zip(*(g.plain() for g in grads))]
            more = torch.where(clips(*joint, limit), 2 * run.u_store * rounded.abs(), 0)
            of_factor = of_factor + more
        w = run.case.w_gates
        through = torch.einsum("kgbj,kgji->gbi", factor, w)
        terms = torch.einsum("kgbj,kgji->gbi", factor.abs(), w.abs())
        error = run.case.error(terms, run.S * len(cell.gates))
        error = error + torch.einsum("kgbj,kgji->gbi", of_factor, w.abs())
        direct = found.direct or (0.0,) * len(carries)
        new = (Tracked(through, error, run.u) + direct[0], *direct[1:])
        return step, tuple(_where(valid, g, c) for g, c in zip(new, carries))


def judge_backward(
    given: OutputGradients,
    kept: Kept,
    options: Options,
    gradients: RecurrenceGradients,
    u_operand: float | None,
) -> list[Verdict]:
    dp, weights, states = gradients
    run = Gates(kept, options, u_operand)
    case, back = run.case, _Backward(run, given, dp)
    steps, firsts = back.steps()
    wanted, error = _in_time(back, [step.dp for step in steps])
    du, of_du = _in_time(back, [step.du for step in steps])
    du = torch.where(run.inside, du, run.of_gates(dp))
    of_du = torch.where(run.inside, of_du + run.u_store * du.abs(), 0)
    du, of_du = map(case.masked, (du, of_du))
    T, B = kept.y.shape[:2]
    dw = torch.einsum("kgtbi,gtbj->kgij", du, case.before)
    terms = torch.einsum("kgtbi,gtbj->kgij", du.abs(), case.before.abs())
    of_dw = case.error(terms, T * B)
    of_dw = of_dw + torch.einsum("kgtbi,gtbj->kgij", of_du, case.before.abs())
    shape = weights.w_hh.shape

    def by_rows(x: Tensor) -> Tensor:  # [k, G, S, S] -> [D * k * n * S, S]
        return x.unflatten(1, (run.D, run.n)).transpose(0, 1).reshape(shape)

    verdicts = [
        verdict("dp", dp, *map(run.gates_in_time, (wanted, error))),
        verdict("dw_hh", weights.w_hh, by_rows(dw), by_rows(of_dw)),
    ]
    if weights.b_hh is not None and run.cell.apart:
        total, terms = du.sum((2, 3)), du.abs().sum((2, 3))
        of_total = case.error(terms, T * B) + of_du.sum((2, 3))
        by_bias = (
            x.unflatten(1, (run.D, run.n)).transpose(0, 1).flatten() for x in (total, of_total)
        )
        wanted_bias, of_bias = by_bias
        inside = run.inside.view(1, -1, 1).expand(run.D, -1, run.n * run.S).flatten()
        found = torch.where(inside, exact(weights.b_hh), wanted_bias).to(weights.b_hh.dtype)
        verdicts.append(verdict("db_hh", found, wanted_bias, of_bias))
    dropped = pick(case.drops, case.first)
    for name, first, last in zip(run.cell.states, firsts, back.last):
        found = getattr(states, name)
        if found is None:
            continue
        value, error = (
            torch.where(case.empty, at_end, torch.where(dropped, 0, x))
            for x, at_end in zip(first.plain(), (last, torch.zeros_like(last)))
        )
        verdicts.append(verdict(f"d{name}_0", found, *map(case.states, (value, error))))
    return verdicts


def judge_record(
    given: OutputGradients,
    kept: Kept,
    options: Options,
    dp: Tensor,
    record: Tensor,
    u_operand: float | None,
) -> list[Verdict]:
    run = Gates(kept, options, u_operand)
    case, cell = run.case, run.cell
    back = _Backward(run, given, dp)
    steps, _ = back.steps()
    da = run.of_gates(dp)

    def joint(which: str) -> tuple[Tensor, Tensor]:
        """The states of a step beside one another."""
        parts = [_in_time(back, list(of)) for of in zip(*(getattr(s, which) for s in steps))]
        return tuple(torch.cat(x, -1) for x in zip(*parts))

    carry, state, clipped = map(joint, ("carries", "grads", "clipped"))
    preact = torch.cat(da.unbind(), -1), run.u_store * torch.cat(da.unbind(), -1).abs()
    measured = {"state": state, "carry": carry, "clipped": clipped, "preact": preact}
    if steps[0].total is not None:
        measured["cell"] = _in_time(back, [step.total for step in steps])
        measured["cell_carry"] = _in_time(back, [step.carries[1] for step in steps])
    found = dict(zip(FIELDS, exact(record).unbind(-1)))
    verdicts = []
    for name, (x, error) in measured.items():
        x, error = case.masked(x), case.masked(error)
        norm, of_norm = (case.over_units(v.square()).sqrt() for v in (x, error))
        of_norm = of_norm + case.error(norm, x.shape[-1] * case.heads) / 2
        square = found[f"{name}_squares"]
        verdicts.append(verdict(f"record.{name}_norm", square.sqrt(), norm, of_norm))
    dh, error = map(case.masked, state)
    largest, of_largest = (case.by_direction(v.abs()).amax(-1) for v in (dh, error))
    verdicts.append(verdict("record.state_max", found["state_max"], largest, of_largest))
    saved = tuple(Tracked(x, 0.0, run.u) for x in run.saved)
    gain, of_gain = map(case.masked, cell.gain(case.y, saved).plain())
    total = case.over_units(gain.abs())
    of_total = case.over_units(of_gain) + case.error(total, case.S * case.heads)
    verdicts.append(verdict("record.gain", found["slopes"], total, of_total))
    ones = case.masked(torch.ones_like(case.y))
    finite = da.isfinite().all(0)
    for part in dh.split(case.S, -1):
        finite = finite & part.isfinite()
    for name, count in (
        ("nonfinite_grad", ~finite),
        ("nonfinite_state", ~case.y.isfinite()),
        ("entries", ones),
        ("carried", torch.where(case.stops | case.at(case.last), 0, ones)),
    ):
        wanted = case.over_units(case.masked(count.double()))
        verdicts.append(verdict(f"record.{name}", found[name], wanted, None))
    return verdicts


def _where(mask: Tensor, a: Tracked | float, b: Tracked) -> Tracked:
    value, error = a.plain() if isinstance(a, Tracked) else (a, 0.0)
    return Tracked(torch.where(mask, value, b.value), torch.where(mask, error, b.error), b.u)


def _clipped(grads: tuple[Tracked, ...], limit: float) -> tuple[Tracked, ...]:
    """All states of a row and head together, scaled down to the limit."""
    values, errors = (torch.cat(v, -1) for v in zip(*(g.plain() for g in grads)))
    u, size = grads[0].u, values.shape[-1]
    # The norm of so many squares has a rounding of its own.
    errors = errors + 4 * math.sqrt(size) * u * values.abs()
    scaled, error = clip_value(values, errors, limit)
    S = size // len(grads)
    pairs = zip(scaled.split(S, -1), error.split(S, -1))
    return tuple(Tracked(value, bound, u) for value, bound in pairs)


def _in_time(back: _Backward, steps: list[Tracked]) -> tuple[Tensor, Tensor]:
    """Values of all steps in turned time, [..., G, B, S] each, as [..., G, T, B, S] in real
    time."""
    stacked = (torch.stack([s.plain()[i] for s in steps], -3) for i in (0, 1))
    value, error = (back.turned(x) for x in stacked)
    return value, error
