"""The time loops in plain PyTorch, for any cell: the oracle of every backend.

Shapes are those of :mod:`rnnfast.recurrence.groups`. A group is one direction of one head, which
is an independent recurrence. With the states s of a cell,

    a_t = p_t + u_t,  u_t = emit(s_{t-1}) W_hh^T,  s_t = step(a_t, u_t, s_{t-1}),  y_t = emit(s_t)

With layer norm, gamma * ahat + beta takes the place of a_t (norm of the sum) or of u_t (norm of
the recurrent part). Backpropagation through time (Werbos 1990), with g_t = dL/dy_t from outside:

    dh_t = emit_back(g_t + du_{t+1} W_hh) + direct_{t+1},  da_t, du_t = step_back(clip(dh_t))

No operation is in place but the record's, and none depends on values: PyTorch can differentiate,
vmap and trace both loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..cells.cell import Cell, StepGradients, Tensors
from .clipping import clip, clipped_step
from .edges import Edges, times, where
from .groups import (
    Kept,
    Options,
    OutputGradients,
    Results,
    Rows,
    Saved,
    States,
    Weights,
    in_head_order,
)
from .measure import Step, measure
from .norm import layer_norm, layer_norm_back
from .precision import arithmetic


class RecurrenceGradients(NamedTuple):
    """The gradients of :func:`forward`."""

    p: Tensor  # [T, B, D * G * H]
    weights: Weights  # b_hh: of the gates in cell.apart, 0 for the others; None without them
    states: States


def forward(p: Tensor, weights: Weights, states: States, rows: Rows, options: Options) -> Results:
    """All steps of all directions.

    Args:
        p: [T, B, D * G * H], the input projection. For a gate in ``cell.apart`` it is without b_hh,
            which the loop adds to the recurrent part.
        weights: w_ih and b_ih are not read.
    """
    T = p.shape[0]
    edges = Edges(T, rows, options.bptt_window)
    found = []
    for d in range(options.directions):
        group = _Direction(d, weights, options)
        found.append(_forward(group, group.split(p), group.first(p, states), edges))
    lasts, *values = zip(*found)
    y, cells, *saved = (None if v[0] is None else torch.cat(v, -1) for v in values)
    last = States(*(torch.stack(s).to(p.dtype) for s in zip(*lasts)))
    return Results(y, last, Saved(*saved), cells)


def _forward(
    group: _Direction, p: Sequence[Tensor], states: Tensors, edges: Edges
) -> tuple[Tensors | Tensor | None, ...]:
    """The last states [B, H], y, c of all steps, and the fields of Saved, of one direction."""
    cell, options, d = group.cell, group.options, group.d
    limit, dtype = options.clip_state_grad, p[0].dtype
    steps: list[list[Tensor]] = [[], [], [], [], []]  # y, c, cell_values, ahat, rstd
    for t in times(edges.T, d):
        valid = edges.valid(t)
        before = tuple(where(edges.cut(t + d), 0, s) for s in states)
        before = tuple(where(edges.window(t + d), s.detach(), s) for s in before)
        a, u, ahat, rstd = group.preactivations(p[t], cell.emit(before).to(dtype))
        inputs = group.widened(a), group.widened(u), before, group.parameters
        step = cell.step if limit is None else partial(clipped_step, cell, limit)
        new, saved = step(*inputs)
        if not cell.saved:
            new = tuple(s.to(dtype) for s in new)
        states = tuple(where(valid, s, old) for s, old in zip(new, states))
        values = (
            cell.emit(new).to(dtype),
            new[1].to(dtype) if options.all_cells else None,
            torch.stack(saved, 1).to(dtype) if saved and options.saves else None,
            None if ahat is None else ahat.to(dtype),
            rstd,
        )
        for of_all_steps, value in zip(steps, values):
            if value is not None:
                of_all_steps.append(where(valid, value, 0))
    last = tuple(s.transpose(0, 1).flatten(1) for s in states)
    return last, *(group.join(of_all_steps) if of_all_steps else None for of_all_steps in steps)


def backward(
    given: OutputGradients,
    kept: Kept,
    options: Options,
    record: Tensor | None = None,
    grad_saved: Saved | None = None,
) -> RecurrenceGradients:
    """The gradient of :func:`forward` from what it returned, as a function to differentiate again.

    Args:
        given: gradients of y and of the last states.
        kept: x is not read. y and saved carry the dependence on p.
        record: [D, T, N, fields] float64, N = B or 1, to be filled; see
            :mod:`rnnfast.recurrence.record`.
        grad_saved: gradients of the saved values, which a second derivative reaches.
    """
    edges = Edges(kept.y.shape[0], kept.rows, options.bptt_window)
    found = []
    for d in range(options.directions):
        group = _Direction(d, kept.weights, options)
        run = _Backward(group, edges, given, kept, grad_saved)
        found.append(run.all_steps(None if record is None else record[d]))
    ps, weights, states = zip(*found)
    w_hh, b_hh, gamma, beta, cell = (
        None if v[0] is None else torch.stack(v) for v in zip(*weights)
    )
    b_hh, gamma, beta = (None if v is None else v.reshape(-1) for v in (b_hh, gamma, beta))
    w_hh = w_hh.reshape(kept.weights.w_hh.shape)
    of_weights = Weights(None, None, b_hh, w_hh, gamma, beta, cell)
    firsts = States(*(torch.stack(s) for s in zip(*states)))
    return RecurrenceGradients(torch.cat(ps, -1), of_weights, firsts)


def outside(cell: Cell, like: Tensor) -> Tensor:
    """bool [G, 1, 1, 1]: the gates whose b_hh is part of p. (torch.tensor would put a copy of a
    constant into a program, which run_decompositions refuses.)"""
    kinds = [torch.full((1,), gate not in cell.apart, device=like.device) for gate in cell.gates]
    return torch.cat(kinds).view(-1, 1, 1, 1)


def _sum(found: StepGradients, more: StepGradients) -> StepGradients:
    """The gradients of a step whose saved values have gradients of their own, ``more``."""
    du = found.du
    if more.du is not None:
        du = (found.da if du is None else du) + more.du
    elif du is not None:
        du = du + more.da
    if found.direct and more.direct:
        direct = tuple(a + b for a, b in zip(found.direct, more.direct))
    else:
        direct = found.direct or more.direct
    own = tuple(a + b for a, b in zip(found.parameters, more.parameters))
    return found._replace(
        da=found.da + more.da, du=du, direct=direct, parameters=own or found.parameters
    )


class _Direction:
    """One direction: its weights, and the order of its values in memory."""

    def __init__(self, d: int, weights: Weights, options: Options) -> None:
        self.cell: Cell = CELLS[options.cell]
        self.d, self.options = d, options
        self.heads, self.G = options.heads, len(self.cell.gates)
        self.S = weights.w_hh.shape[1]
        self.H = self.heads * self.S
        rows = weights.w_hh.narrow(0, d * self.G * self.H, self.G * self.H)
        self.w = rows.reshape(self.G, self.heads, self.S, self.S)
        self.gamma, self.beta = self._vector(weights.gamma), self._vector(weights.beta)
        self.inside = outside(self.cell, self.w).logical_not() if self.cell.apart else None
        bias = self._vector(weights.b_hh) if self.cell.apart else None
        self.bias = None if bias is None else torch.where(self.inside, bias, 0)
        own = () if weights.cell_parameters is None else weights.cell_parameters[d].unbind()
        self.parameters = tuple(v.view(self.heads, 1, self.S) for v in own)

    def widened(self, x: Tensor) -> Tensor:
        """Values that the cell computes with: in float32 at least where it saves some."""
        return x.to(arithmetic(x.dtype)) if self.cell.saved else x

    def _vector(self, v: Tensor | None) -> Tensor | None:
        """[D * G * H] as [G, n, 1, S]."""
        return None if v is None else self.of_gates(v[None])

    def of_gates(self, x: Tensor, values: int | None = None) -> Tensor:
        """[B, D * G * H] of one step as [G, n, B, S]; ``values`` in the place of G."""
        G, n, S = self.G if values is None else values, self.heads, self.S
        return in_head_order(x, self.d, G * n, S).reshape(G, n, x.shape[0], S)

    def saved(self, x: Tensor) -> Tensors:
        """Saved.cell_values [B, D * n * k * S] of one step, [n, B, S] each."""
        k = len(self.cell.saved)
        values = in_head_order(x, self.d, self.heads, k * self.S)
        return self.widened(values).reshape(self.heads, -1, k, self.S).unbind(2)

    def of_units(self, x: Tensor, width: int | None = None) -> Tensor:
        """[B, D * H] of one step as [n, B, S]; ``width`` in the place of S."""
        return in_head_order(x, self.d, self.heads, width or self.S)

    def split(self, p: Tensor) -> list[Tensor]:
        return [self.of_gates(p[t]) for t in range(p.shape[0])]

    def first(self, like: Tensor, states: States) -> Tensors:
        """The states before the first step, [n, B, S] each."""
        zeros = like.new_zeros(self.heads, like.shape[1], self.S)
        given = (getattr(states, name) for name in self.cell.states)
        return tuple(
            self.widened(zeros if s is None else in_head_order(s[self.d], 0, self.heads, self.S))
            for s in given
        )

    def join(self, steps: list[Tensor]) -> Tensor:
        """Values of all steps, in the order of the direction, [..., B, S] each, as
        [T, B, ... * S] in real time."""
        x = torch.stack(steps[::-1] if self.d else steps).movedim(-2, 1)
        return x.flatten(2)

    def preactivations(
        self, p: Tensor, emitted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """a, u, and with layer norm ahat [G, n, B, S] and rstd [n, B, 1]."""
        u = emitted @ self.w.mT
        ahat = rstd = None
        if self.gamma is not None and self.cell.norm == "recurrent":
            u, ahat, rstd = self._normalized(u)
            u = u.to(p.dtype)
        if self.bias is not None:
            u = u + self.bias
        a = self._sum(p, u)
        if self.gamma is not None and self.cell.norm == "sum":
            a, ahat, rstd = self._normalized(a)
        return a, u, ahat, rstd

    def _sum(self, p: Tensor, u: Tensor) -> Tensor:
        if not self.cell.apart:
            return p + u
        return torch.where(self.inside, p, p + u)

    def _normalized(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gamma * ahat + beta, ahat and rstd: over all gates and units of a head."""
        flat, rstd = layer_norm(self.by_head(a.to(self.gamma.dtype)), self.options.norm_eps)
        ahat = self.by_gate(flat)
        return self.affine(ahat), ahat, rstd

    def affine(self, ahat: Tensor) -> Tensor:
        return ahat * self.gamma if self.beta is None else ahat * self.gamma + self.beta

    def by_head(self, x: Tensor) -> Tensor:
        """[G, n, B, S] as [n, B, G * S]."""
        return x[0] if self.G == 1 else x.movedim(0, 2).flatten(2)

    def by_gate(self, x: Tensor) -> Tensor:
        """[n, B, G * S] as [G, n, B, S]."""
        return x[None] if self.G == 1 else x.unflatten(2, (self.G, self.S)).movedim(2, 0)


class _Backward:
    """BPTT of one direction."""

    def __init__(
        self,
        group: _Direction,
        edges: Edges,
        given: OutputGradients,
        kept: Kept,
        grad_saved: Saved | None,
    ) -> None:
        self.group, self.edges, self.given, self.kept = group, edges, given, kept
        self.grad_saved = grad_saved or Saved()
        self.times = times(edges.T, group.d)
        self.start = group.first(kept.y, kept.states)
        self.last = group.first(kept.y, given.states)
        self.sums: list[Tensor | int] = [0] * (4 + len(group.parameters))
        self.sums[0] = torch.zeros_like(group.w)

    def all_steps(self, record: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...], Tensors]:
        """dp, the gradients of w_hh, b_hh, gamma, beta and the cell's parameters, and those of the
        first states."""
        group, T = self.group, self.edges.T
        carries = tuple(torch.zeros_like(s) for s in self.start)
        das = []
        for s in reversed(range(T)):
            da, carries = self.step(s, carries, None if record is None else record[self.times[s]])
            das.append(da)
        lengths = self.kept.rows.lengths
        if lengths is not None:  # a row without steps hands its last states to its first
            empty = (lengths == 0).unsqueeze(1)
            carries = tuple(torch.where(empty, last, c) for last, c in zip(self.last, carries))
        B = self.kept.y.shape[1]
        dtype = self.kept.y.dtype
        firsts = tuple(c.transpose(0, 1).reshape(B, group.H).to(dtype) for c in carries)
        return self._joined(das), self._weights(), firsts

    def _joined(self, das: list[Tensor]) -> Tensor:
        """dp of all steps, by operations that is_grads_batched can map."""
        T, B = self.kept.y.shape[:2]
        blocks = self.group.G * self.group.heads
        in_time = das if self.group.d else das[::-1]
        rows = [da.reshape(blocks, B, self.group.S).transpose(0, 1) for da in in_time]
        return torch.stack(rows).reshape(T, B, blocks * self.group.S)

    def _weights(self) -> tuple[Tensor | None, ...]:
        group = self.group
        dw, db, dgamma, dbeta, *own = self.sums
        normed = group.gamma is not None
        return (
            dw.view(group.G * group.H, group.S),
            db.reshape(-1) if group.cell.apart else None,
            dgamma.reshape(-1) if normed else None,
            dbeta.reshape(-1) if normed else None,
            torch.stack([v.reshape(-1) for v in own]) if own else None,
        )

    def at(self, t: int) -> tuple[Tensor, Tensors]:
        """The output at step t, and the cell's saved values."""
        group, saved = self.group, self.kept.saved.cell_values
        emitted = group.of_units(self.kept.y[t])
        return emitted, () if saved is None else group.saved(saved[t])

    def before(self, s: int) -> Tensor:
        """The factor of W_hh in the s-th step of this direction."""
        group, edges, d, t = self.group, self.edges, self.group.d, self.times[s]
        emit, y = group.cell.emit, self.kept.y
        emitted = emit(self.start).to(y.dtype)
        if s:
            emitted = where(edges.begins(t, d), emitted, group.of_units(y[self.times[s - 1]]))
        emitted = where(edges.window(t + d), emitted.detach(), emitted)
        fresh = emit(tuple(torch.zeros_like(x) for x in self.start)).to(y.dtype)
        return where(edges.cut(t + d), fresh, emitted)

    def step(self, s: int, carries: Tensors, record: Tensor | None) -> tuple[Tensor, Tensors]:
        """da of the s-th step of this direction, and the gradients of the states before it."""
        group, edges, d, t = self.group, self.edges, self.group.d, self.times[s]
        cell, limit = group.cell, group.options.clip_state_grad
        valid = edges.valid(t)
        emitted, saved = self.at(t)
        enters = edges.enters(t, d)
        grads = tuple(c + where(enters, last, 0) for c, last in zip(carries, self.last))
        if self.given.y is not None:
            into = cell.emit_back(group.of_units(self.given.y[t]), emitted)
            grads = (grads[0] + into, *grads[1:])
        if self.given.cells is not None:
            grads = (grads[0], grads[1] + group.of_units(self.given.cells[t]))
        clipped = grads if limit is None else clip(limit, *grads)
        before = self.before(s)
        states = cell.states_before(group.widened(before), saved)
        ahat, rstd = self._norm_values(t)
        a = group.affine(ahat) if ahat is not None and cell.norm == "sum" else None
        found = cell.step_back(clipped, states, emitted, saved, a, group.parameters)
        if self.grad_saved.cell_values is not None:
            more = cell.saved_back(group.saved(self.grad_saved.cell_values[t]), saved)
            found = _sum(found, more)
        da = where(valid, found.da.to(emitted.dtype), 0)
        du = da if found.du is None else where(valid, found.du.to(emitted.dtype), 0)
        if group.inside is not None:
            self.sums[1] = self.sums[1] + torch.where(group.inside, du, 0).sum(2)
        if ahat is not None:
            da, du = self._through_norm(t, da, du, ahat, rstd, valid)
        for i, gradient in enumerate(found.parameters, 4):
            self.sums[i] = self.sums[i] + where(valid, gradient, 0).sum(1)
        if record is not None:
            carried = edges.carried(t, d)
            gain = cell.gain(emitted, saved)
            measured = Step(carries, grads, clipped, da, emitted, gain, found.total)
            measure(record, measured, valid, carried)
        self.sums[0] = self.sums[0] + du.mT @ before
        through = cell.emit_back((du @ group.w).sum(0), before)
        new = (through + found.direct[0], *found.direct[1:]) if found.direct else (through,)
        carries = tuple(where(valid, g, c) for g, c in zip(new, carries))
        for stops in (edges.cut(t + d), edges.window(t + d)):
            carries = tuple(where(stops, torch.zeros_like(c), c) for c in carries)
        return da, carries

    def _norm_values(self, t: int) -> tuple[Tensor | None, Tensor | None]:
        group, saved = self.group, self.kept.saved
        if group.gamma is None:
            return None, None
        ahat = group.of_gates(saved.ahat[t]).to(group.gamma.dtype)
        return ahat, group.of_units(saved.rstd[t], 1)

    def _through_norm(
        self,
        t: int,
        da: Tensor,
        du: Tensor,
        ahat: Tensor,
        rstd: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients before layer norm; adds to those of gamma and beta."""
        group, y = self.group, self.kept.y
        of_sum = group.cell.norm == "sum"
        dn = (da if of_sum else du).to(group.gamma.dtype)
        self.sums[2] = self.sums[2] + (dn * ahat).sum(2)
        self.sums[3] = self.sums[3] + dn.sum(2)
        dn = dn * group.gamma
        if self.grad_saved.ahat is not None:
            dn = dn + group.of_gates(self.grad_saved.ahat[t])
        grad_rstd = self.grad_saved.rstd
        grad_rstd = None if grad_rstd is None else group.of_units(grad_rstd[t], 1)
        back = layer_norm_back(group.by_head(dn), group.by_head(ahat), rstd, grad_rstd)
        back = where(valid, group.by_gate(back).to(y.dtype), 0)
        return (back, back) if of_sum else (da, back)
