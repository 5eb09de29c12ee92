"""The kernel's own tensors in float64, by group, and what an error may be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..cells.cell import Cell
from ..recurrence.groups import Kept, Options, OutputGradients
from ..recurrence.precision import arithmetic


class Verdict(NamedTuple):
    """The largest error of one tensor in parts of its budget, and its place."""

    name: str
    ratio: float  # largest |error| / allowed; infinite where a value is NaN
    index: tuple[int, ...]  # of that element: (t, b, unit) of a sequence
    value: float
    wanted: float

    @property
    def good(self) -> bool:
        return self.ratio <= 1

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return (
            f"{self.name}: {self.ratio:.3g} of its error budget at [{where}]: "
            f"{self.value!r}, wanted {self.wanted!r}"
        )


def clip(dh: Tensor, error: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """dh, clipped over the last axis, and its error."""
    norm = torch.linalg.vector_norm(dh, dim=-1, keepdim=True)
    along = (dh.abs() * error).sum(-1, keepdim=True)  # norm times the error of the norm
    scale = torch.where((norm < torch.inf) & (norm > limit), limit / norm, 1)
    of_scale = dh.abs() * scale * along / norm.square()
    return dh * scale, scale * error + torch.where(clips(dh, error, limit), of_scale, 0)


def clips(dh: Tensor, error: Tensor, limit: float) -> Tensor:
    """Which rows are clipped, or would be with that error."""
    norm = torch.linalg.vector_norm(dh, dim=-1, keepdim=True)
    along = (dh.abs() * error).sum(-1, keepdim=True)
    return (norm < torch.inf) & (norm + along / norm > limit)


class Case:
    """The kernel's own outputs in float64, by group (direction and head): [G, T, B, S]."""

    def __init__(self, kept: Kept, options: Options, u_operand: float | None) -> None:
        y, w_hh, h_0, (lengths, reset) = kept.y, kept.weights.w_hh, kept.states.h, kept.rows
        self.cell: Cell = CELLS[options.cell]
        T, B, _ = y.shape
        self.D, self.heads, self.S = options.directions, options.heads, w_hh.shape[1]
        n, H = self.heads, self.heads * self.S
        self.G = self.D * n
        self.u_operand = u_operand or torch.finfo(arithmetic(y.dtype)).eps / 2
        self.u_store = torch.finfo(y.dtype).eps / 2
        self.tiny = torch.finfo(arithmetic(y.dtype)).smallest_normal
        self.y = self.by_group(y)
        gates = len(self.cell.gates)
        by_gate = exact(w_hh).view(self.D, gates, n, self.S, self.S).transpose(0, 1)
        self.w_gates = by_gate.flatten(1, 2)  # [gates, G, S, S]
        self.w_hh = self.w_gates[0]  # of a cell with one gate
        h_0 = torch.zeros(self.D, B, H) if h_0 is None else h_0
        self.h_0 = self.states_by_group(h_0)
        lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
        valid = torch.arange(T + 1).unsqueeze(1) < lengths
        self.valid = valid[:T].view(1, T, B, 1)
        self.empty = (lengths == 0).view(1, B, 1)
        begin, end = torch.zeros(B, dtype=torch.int64), (lengths - 1).clamp(min=0)
        self.first = self.per_group(torch.stack([begin, end]))  # [G, B], real time
        self.last = self.per_group(torch.stack([end, begin]))
        # Edge e lies before step e: [T + 1, B].
        cut, window = torch.zeros_like(valid), torch.zeros_like(valid)
        if reset is not None:
            cut[:T] = reset.cpu()
        if options.bptt_window is not None:
            window[options.bptt_window :: options.bptt_window] = True
        cut, window = cut & valid, window & valid
        no_state, no_gradient = cut.unsqueeze(-1), (cut | window).unsqueeze(-1)
        # In the direction's order: before a step nothing of the state, after it none of the
        # gradient.
        self.drops = self.per_group(torch.stack([no_state[:-1], no_state[1:]]))
        self.stops = self.per_group(torch.stack([no_gradient[1:], no_gradient[:-1]]))
        before = torch.where(self.at(self.first), self.h_0.unsqueeze(1), self.shifted(self.y, 1))
        self.before = self.masked(torch.where(self.drops, 0, before))

    def state_gradient(
        self, given: OutputGradients, da: Tensor, limit: float | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Computes, from da of the steps after: the part of dh that came back through time, and dh
        with the part from outside, each with its error. The third result is how much da may differ
        from the factor of the product."""
        grad_y, grad_h_n = given.y, given.states.h
        g = torch.zeros_like(self.y) if grad_y is None else self.by_group(grad_y)
        ends = self.at(self.last)
        after = self.shifted(da, -1)  # da of the step that BPTT takes before this one
        outside, outer = g, g.abs()
        if grad_h_n is not None:
            last = self.states_by_group(grad_h_n).unsqueeze(1)
            outside, outer = (
                v + torch.where(ends, x, 0) for v, x in ((outside, last), (outer, last.abs()))
            )
        carry, terms = (
            torch.where(self.stops | ends, 0, torch.einsum("gtbj,gji->gtbi", x, w))
            for x, w in ((after, self.w_hh), (after.abs(), self.w_hh.abs()))
        )
        dh, error = self.masked(outside + carry), self.masked(self.error(outer + terms, self.S))
        carry, of_carry = self.masked(carry), self.masked(self.error(terms, self.S))
        of_da = torch.zeros_like(da)
        if limit is not None:
            of_da = torch.where(clips(dh, error, limit), 2 * self.u_store * da.abs(), 0)
            more = torch.einsum("gtbj,gji->gtbi", self.shifted(of_da, -1), self.w_hh.abs())
            more = self.masked(torch.where(self.stops | ends, 0, more))
            error, of_carry = error + more, of_carry + more
        return (carry, of_carry), (dh, error), of_da

    def value(self, a: Tensor) -> Tensor:
        """The state that the cell makes of pre-activations."""
        return self.cell.step(a[None], a[None], (self.before,), ())[0][0]

    def through(self, dh: Tensor, h: Tensor) -> Tensor:
        """da that the cell makes of the gradient of its state."""
        return self.cell.step_back((dh,), (self.before,), h, (), None, ()).da[0]

    def by_direction(self, x: Tensor) -> Tensor:
        """[G, T, B, S] -> [D, T, B, H]."""
        return x.unflatten(0, (self.D, self.heads)).movedim(1, 3).flatten(3)

    def over_units(self, x: Tensor) -> Tensor:
        """Sums [G, T, B, S] over a direction: [D, T, B]."""
        return self.by_direction(x).sum(-1)

    def by_group(self, x: Tensor) -> Tensor:
        """[..., G * k] -> [G, ..., k] in float64; a vector [G * k] -> [G, 1, 1, k]."""
        x = torch.stack(exact(x).chunk(self.G, -1))
        return x[:, None, None] if x.dim() == 2 else x

    def steps(self, x: Tensor) -> Tensor:
        """[G, T, B, k] -> [T, B, G * k], the steps that rows do not have as 0."""
        return torch.cat(list(self.masked(x)), -1)

    def states_by_group(self, x: Tensor) -> Tensor:
        """[D, B, H] -> [G, B, S] in float64."""
        return exact(x).unflatten(-1, (self.heads, self.S)).transpose(1, 2).flatten(0, 1)

    def states(self, x: Tensor) -> Tensor:
        """[G, B, S] -> [D, B, H]."""
        return x.unflatten(0, (self.D, self.heads)).transpose(1, 2).flatten(2)

    def per_group(self, both: Tensor) -> Tensor:
        """Values of both directions, [2, ...] -> [G, ...]."""
        return both[: self.D].repeat_interleave(self.heads, 0)

    def shifted(self, x: Tensor, by: int) -> Tensor:
        """x [G, T, B, S] of the step before (by = 1) or after (-1), in the direction's order; 0
        where there is none."""
        n, found = self.heads, torch.zeros_like(x)
        for groups, step in ((slice(n), by), (slice(n, None), -by)):
            if step > 0:
                found[groups, 1:] = x[groups, :-1]
            else:
                found[groups, :-1] = x[groups, 1:]
        return found

    def at(self, times: Tensor) -> Tensor:
        """Where the steps of times [G, B] are: [G, T, B, 1]."""
        return (torch.arange(self.y.shape[1]).view(-1, 1) == times.unsqueeze(1)).unsqueeze(-1)

    def masked(self, x: Tensor) -> Tensor:
        return torch.where(self.valid, x, 0)

    def error(self, terms: Tensor, products: int) -> Tensor:
        """The allowed error of a sum of so many products. A subnormal product may count as zero."""
        rounding = 4 * math.sqrt(products) * self.u_operand * terms
        return torch.where(terms == 0, 0, rounding + products * self.tiny)


def verdict(name: str, value: Tensor, wanted: Tensor, error: Tensor | None) -> Verdict:
    """Compares value with wanted. error: allowed before value was rounded to be stored. None: they
    must be equal to the bit."""
    found = (exact(value) - wanted).abs()
    if error is None:
        allowed = torch.zeros_like(found)
    else:
        info = torch.finfo(value.dtype)
        spacing = info.smallest_normal * info.eps  # of its subnormals, where u has no meaning
        tiny = torch.finfo(arithmetic(value.dtype)).smallest_normal  # they may count as zero
        least = torch.where(error == 0, 0, max(spacing, tiny))
        own = torch.finfo(torch.float64).eps * wanted.abs()  # wanted was rounded, too
        allowed = info.eps * wanted.abs() + error + least + own  # eps = 2 u
    ratio = torch.where(found == 0, 0, found / allowed)
    if not ratio.numel():
        return Verdict(name, 0.0, (), 0.0, 0.0)
    ratio = torch.where(ratio.isnan(), math.inf, ratio)  # a NaN is the worst there is
    at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    return Verdict(name, ratio[at].item(), at, value[at].item(), wanted[at].item())


def exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def pick(x: Tensor, times: Tensor) -> Tensor:
    """x [G, T, B, S] at times [G, B] -> [G, B, S]."""
    return x.gather(1, times[:, None, :, None].expand(-1, -1, -1, x.shape[-1])).squeeze(1)
