"""The judge of a recurrence: its errors against float64, per time step, with the worst step named.

A score over a whole sequence hides a wrong step: at T = 2000, B = 64 a zeroed h[0, 0, :] is 1e-5 of
it. So there are two budgets, and a result must stay within both.

Steps (:func:`judge_forward`, :func:`judge_backward`, :func:`judge_record`): each step is taken
again in float64 from what the kernel itself put out before it, and every element has

    |error| <= 2 u_store |result| + 4 sqrt(K) u_operand sum of |terms|

u_store is the unit roundoff of the stored dtype, u_operand that of the arithmetic (float32 for
narrower storage), and K is the number of products in the sum. Numbers below the normal range may
count as zero. Operations after the sum (layer norm, clipping) pass the second part on to first
order. No error accumulates, so any case may be judged.

Sequences (:func:`error_ratio`): the worst step's RMS error over a whole sequence against float64,
as a multiple of what torch's own nn.RNN makes on the same input; for contracting recurrences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import CELLS
from .cells.cell import Cell
from .recurrence.groups import Kept, Options, OutputGradients, Results, Rows, States, Weights
from .recurrence.loop import RecurrenceGradients
from .recurrence.precision import arithmetic
from .recurrence.record import FIELDS


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


def judge_forward(
    p: Tensor,
    weights: Weights,
    states: States,
    rows: Rows,
    options: Options,
    results: Results,
    *,
    u_operand: float | None = None,
    of_p: Tensor | None = None,
) -> list[Verdict]:
    """Judges the results of :func:`rnnfast.recurrence.loop.forward`, each step restarted from the
    y before it.

    Past a row's length y, ahat and rstd must be 0; h_n must be the last valid y (or h_0), to the
    bit. of_p: the error allowed to p itself, where a module made it; like p.
    """
    y, (h_n, _), (_, ahat, rstd), _ = results
    gamma, beta = weights.gamma, weights.beta
    case = _Case(Kept(None, y, weights, states, rows, results.saved), options, u_operand)
    p = case.by_group(p)
    n = p + torch.einsum("gtbj,gij->gtbi", case.before, case.w_hh)
    terms = p.abs() + torch.einsum("gtbj,gij->gtbi", case.before.abs(), case.w_hh.abs())
    error = case.error(terms, case.S)
    if of_p is not None:
        error = error + case.by_group(of_p)
    saved = []
    if gamma is not None:
        gain = case.by_group(gamma)
        bias = torch.zeros_like(gain) if beta is None else case.by_group(beta)
        centred = n - n.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + options.norm_eps).rsqrt()
        normal = centred * scale
        of_scale = scale.square() * (normal.abs() * error).mean(-1, keepdim=True)
        of_scale += 4 * case.u_operand * scale
        error = _through_norm(error, normal, scale)
        saved = [
            _verdict("ahat", ahat, *map(case.steps, (normal, error))),
            _verdict("rstd", rstd, *map(case.steps, (scale, of_scale))),
        ]
        n = normal * gain + bias
        error = gain.abs() * error
        error += 4 * case.u_operand * ((normal * gain).abs() + bias.abs())
    h = case.value(n)
    wanted_n = torch.where(case.empty, case.h_0, _pick(case.y, case.last))
    return [
        _verdict("y", y, *map(case.steps, (h, error))),
        _verdict("h_n", h_n, case.states(wanted_n), None),
        *saved,
    ]


def judge_backward(
    given: OutputGradients,
    kept: Kept,
    options: Options,
    gradients: RecurrenceGradients,
    *,
    u_operand: float | None = None,
) -> list[Verdict]:
    """Judges the results of :func:`rnnfast.recurrence.loop.backward` from what the kernel saved:
    each step of dp restarted from the dp after it, and the sums from dp.

    A kernel may clip a row before it multiplies da, or it may clip the product. In the second case
    dp and the factor of the product are rounded separately, each to within u_store. f' comes from
    y, or from ahat if y has 16 bits.
    """
    dp, (_, _, _, dw_hh, dgamma, dbeta, _), (dh_0, _) = gradients
    y, gamma, beta = kept.y, kept.weights.gamma, kept.weights.beta
    case = _Case(kept, options, u_operand)
    T, B, S = *y.shape[:2], case.S
    da = case.by_group(dp)
    _, (dh, error), of_da = case.state_gradient(given, da, options.clip_state_grad)
    if options.clip_state_grad is not None:
        dh, error = _clip(dh, error, options.clip_state_grad)
    h = case.y
    if gamma is not None:
        gain, normal, scale = map(case.by_group, (gamma, kept.saved.ahat, kept.saved.rstd))
        if y.dtype != gamma.dtype and case.cell.recomputes:  # h from ahat
            bias = torch.zeros_like(gain) if beta is None else case.by_group(beta)
            h = case.value(normal * gain + bias)
            # |f''| <= 1, and h has the arithmetic's rounding
            of_n = (normal * gain).abs() + bias.abs()
            error = error + 4 * case.u_operand * dh.abs() * (1 + of_n)
    dn = case.through(dh, h)  # |f'| <= 1: the error is no larger
    wanted = dn
    sums = []
    if gamma is not None:
        for name, value, factor in (
            ("dgamma", dgamma, normal),
            ("dbeta", dbeta, torch.ones_like(normal)),
        ):
            if value is None:
                continue
            total, terms = (dn * factor).sum((1, 2)), (dn * factor).abs().sum((1, 2))
            of_total = case.error(terms, T * B) + (factor.abs() * error).sum((1, 2))
            sums.append(_verdict(name, value, total.flatten(), of_total.flatten()))
        dahat, error = gain * dn, _through_norm(gain.abs() * error, normal, scale)
        along = (dahat * normal).mean(-1, keepdim=True)
        wanted = scale * (dahat - dahat.mean(-1, keepdim=True) - normal * along)
    dw = torch.einsum("gtbi,gtbj->gij", da, case.before)
    terms = torch.einsum("gtbi,gtbj->gij", da.abs(), case.before.abs())
    verdicts = [
        _verdict("dp", dp, *map(case.steps, (wanted, error))),
        _verdict("dw_hh", dw_hh, *(x.reshape(dw_hh.shape) for x in (dw, case.error(terms, T * B)))),
        *sums,
    ]
    if dh_0 is not None:
        first, dropped = _pick(da, case.first), _pick(case.drops, case.first)
        into = torch.einsum("gbj,gji->gbi", first, case.w_hh)
        wanted = torch.where(dropped, 0, into)
        if given.states.h is not None:
            wanted = torch.where(case.empty, case.states_by_group(given.states.h), wanted)
        terms = torch.einsum("gbj,gji->gbi", first.abs(), case.w_hh.abs())
        error = case.error(torch.where(case.empty | dropped, 0, terms), S)
        error += torch.einsum("gbj,gji->gbi", _pick(of_da, case.first), case.w_hh.abs())
        verdicts.append(_verdict("dh_0", dh_0, *map(case.states, (wanted, error))))
    return verdicts


def judge_record(
    given: OutputGradients,
    kept: Kept,
    options: Options,
    dp: Tensor,
    record: Tensor,
    *,
    u_operand: float | None = None,
) -> list[Verdict]:
    """Judges what a backward pass measured of each row, from the y it read and the dp it put out.

    record: [D, T, B, fields] of :mod:`rnnfast.recurrence.record`; indices are (d, t, b).

    dh is taken again from the dp of the step after, so it has the error that
    :func:`judge_backward` allows it, e for each element; and a norm is off by no more than the norm
    of e (the triangle inequality), a largest magnitude by no more than the largest e. da was
    measured before or after it was rounded to be stored: e = u_store |da|. The sum of squares, one
    of H products, may err by 4 sqrt(H) u of itself, its root by half of that. Counts are exact.
    """
    case = _Case(kept, options, u_operand)
    da = case.by_group(dp)
    limit = options.clip_state_grad
    carry, state, _ = case.state_gradient(given, da, limit)
    clipped = state if limit is None else _clip(*state, limit)
    preact = da, torch.finfo(dp.dtype).eps / 2 * da.abs()
    found = dict(zip(FIELDS, _exact(record).unbind(-1)))
    verdicts = []
    for name, (x, error) in zip(
        ("state", "carry", "clipped", "preact"), (state, carry, clipped, preact)
    ):
        norm, of_norm = (case.over_units(v.square()).sqrt() for v in (x, error))
        of_norm = of_norm + case.error(norm, case.S * case.heads) / 2
        square = found[f"{name}_squares"]
        verdicts.append(_verdict(f"record.{name}_norm", square.sqrt(), norm, of_norm))
    ones = case.masked(torch.ones_like(case.y))
    dh, error = state
    largest, of_largest = (case.by_direction(v.abs()).amax(-1) for v in (dh, error))
    slopes = case.masked(case.cell.gain(case.y, ()).abs())
    entries = case.over_units(ones)
    of_slopes = case.error(entries, case.S * case.heads)  # |f'| <= 1
    verdicts.append(_verdict("record.state_max", found["state_max"], largest, of_largest))
    verdicts.append(_verdict("record.gain", found["slopes"], case.over_units(slopes), of_slopes))
    for name, count in (
        ("nonfinite_grad", ~(dh.isfinite() & da.isfinite())),
        ("nonfinite_state", ~case.y.isfinite()),
        ("entries", ones),
        ("carried", torch.where(case.stops | case.at(case.last), 0, ones)),
    ):
        wanted = case.over_units(case.masked(count.double()))
        verdicts.append(_verdict(f"record.{name}", found[name], wanted, None))
    return verdicts


def judge_sum(
    name: str,
    value: Tensor,
    dp: Tensor,
    factor: Tensor | None = None,
    *,
    u_operand: float | None = None,
) -> Verdict:
    """Judges a gradient that is the sum over t and b of dp [T, B, H], times a factor [T, B, I] if
    there is one: db [H], or dw_ih [H, I]; on the budget of dw_hh."""
    da = _exact(dp).flatten(0, 1)
    by = torch.ones_like(da[:, :1]) if factor is None else _exact(factor).flatten(0, 1)
    u = u_operand or torch.finfo(arithmetic(dp.dtype)).eps / 2
    wanted, terms = ((f(da).T @ f(by)).view(value.shape) for f in (torch.positive, torch.abs))
    return _verdict(name, value, wanted, 4 * math.sqrt(len(da)) * u * terms)


def _through_norm(error: Tensor, ahat: Tensor, rstd: Tensor) -> Tensor:
    """The error of ahat that an error of a causes; also the error of da from one of dahat."""
    # With v = mean((a - mean(a))^2) and rstd = (v + eps)^(-1/2), to first order
    #     d mean(a) = mean(da),  dv = 2 mean((a - mean(a)) da),
    #     d rstd = -1/2 rstd^3 dv = -rstd^2 mean(ahat da),
    #     d ahat = rstd (da - mean(da)) + (a - mean(a)) d rstd
    #            = rstd (da - mean(da) - ahat mean(ahat da)),
    # exact in eps too. With |da| <= e the sum of magnitudes is the bound; and the map is symmetric,
    # so that backward, which is its transpose, has the same one. The norm's own rounding is inside:
    # e holds several u |a|, so this holds several u rstd (|a| + mean |a|) >= u |ahat|.
    along = (ahat.abs() * error).mean(-1, keepdim=True)
    return rstd * (error + error.mean(-1, keepdim=True) + ahat.abs() * along)


def _clip(dh: Tensor, error: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """dh, clipped over the last axis, and its error."""
    norm = torch.linalg.vector_norm(dh, dim=-1, keepdim=True)
    along = (dh.abs() * error).sum(-1, keepdim=True)  # norm times the error of the norm
    scale = torch.where((norm < torch.inf) & (norm > limit), limit / norm, 1)
    of_scale = dh.abs() * scale * along / norm.square()
    return dh * scale, scale * error + torch.where(_clips(dh, error, limit), of_scale, 0)


def _clips(dh: Tensor, error: Tensor, limit: float) -> Tensor:
    """Which rows are clipped, or would be with that error."""
    norm = torch.linalg.vector_norm(dh, dim=-1, keepdim=True)
    along = (dh.abs() * error).sum(-1, keepdim=True)
    return (norm < torch.inf) & (norm + along / norm > limit)


class _Case:
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
        self.y, self.w_hh = self.by_group(y), _exact(w_hh).reshape(self.G, self.S, self.S)
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
            of_da = torch.where(_clips(dh, error, limit), 2 * self.u_store * da.abs(), 0)
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
        x = torch.stack(_exact(x).chunk(self.G, -1))
        return x[:, None, None] if x.dim() == 2 else x

    def steps(self, x: Tensor) -> Tensor:
        """[G, T, B, k] -> [T, B, G * k], the steps that rows do not have as 0."""
        return torch.cat(list(self.masked(x)), -1)

    def states_by_group(self, x: Tensor) -> Tensor:
        """[D, B, H] -> [G, B, S] in float64."""
        return _exact(x).unflatten(-1, (self.heads, self.S)).transpose(1, 2).flatten(0, 1)

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


def _verdict(name: str, value: Tensor, wanted: Tensor, error: Tensor | None) -> Verdict:
    """Compares value with wanted. error: allowed before value was rounded to be stored. None: they
    must be equal to the bit."""
    found = (_exact(value) - wanted).abs()
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


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _pick(x: Tensor, times: Tensor) -> Tensor:
    """x [G, T, B, S] at times [G, B] -> [G, B, S]."""
    return x.gather(1, times[:, None, :, None].expand(-1, -1, -1, x.shape[-1])).squeeze(1)


class StepError(NamedTuple):
    """The largest RMS error of a time step, and the step."""

    rms: float
    t: int


def worst_step(runs: Iterable[tuple[Tensor, Tensor]]) -> StepError:
    """RMS over batch and units at each step, pooled over runs of one shape; the largest.

    Args:
        runs: (result, float64 result), each [T, ...]; a tensor without time axis is [1, ...].
    """
    rms = step_errors(runs)
    t = int(rms.argmax())  # a NaN counts as the largest
    return StepError(rms[t].item(), t)


def step_errors(runs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """That RMS error of every step: [T]."""
    squares = [(_exact(r) - _exact(e)).square().flatten(1).mean(1) for r, e in runs]
    return torch.stack(squares).mean(0).sqrt()


def error_ratio(ours: StepError, theirs: StepError) -> float:
    """Our error over theirs; 1 if both are 0."""
    if ours.rms == theirs.rms == 0:
        return 1.0
    return math.inf if theirs.rms == 0 else ours.rms / theirs.rms
