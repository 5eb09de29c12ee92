"""The judge of a recurrence, step by step: :mod:`rnnfast.testing` says what it allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cells import CELLS
from ..recurrence.groups import Kept, Options, OutputGradients, Results, Rows, States, Weights
from ..recurrence.loop import RecurrenceGradients
from ..recurrence.precision import arithmetic
from ..recurrence.record import FIELDS
from . import gated
from .case import Case, Verdict, clip, exact, pick, verdict


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
    if CELLS[options.cell].saved:
        inputs = p, weights, states, rows, options, results
        return gated.judge_forward(*inputs, u_operand, of_p)
    y, (h_n, _), (_, ahat, rstd), _ = results
    gamma, beta = weights.gamma, weights.beta
    case = Case(Kept(None, y, weights, states, rows, results.saved), options, u_operand)
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
            verdict("ahat", ahat, *map(case.steps, (normal, error))),
            verdict("rstd", rstd, *map(case.steps, (scale, of_scale))),
        ]
        n = normal * gain + bias
        error = gain.abs() * error
        error += 4 * case.u_operand * ((normal * gain).abs() + bias.abs())
    h = case.value(n)
    wanted_n = torch.where(case.empty, case.h_0, pick(case.y, case.last))
    return [
        verdict("y", y, *map(case.steps, (h, error))),
        verdict("h_n", h_n, case.states(wanted_n), None),
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
    if CELLS[options.cell].saved:
        return gated.judge_backward(given, kept, options, gradients, u_operand)
    dp, (_, _, _, dw_hh, dgamma, dbeta, _), (dh_0, _) = gradients
    y, gamma, beta = kept.y, kept.weights.gamma, kept.weights.beta
    case = Case(kept, options, u_operand)
    T, B, S = *y.shape[:2], case.S
    da = case.by_group(dp)
    _, (dh, error), of_da = case.state_gradient(given, da, options.clip_state_grad)
    if options.clip_state_grad is not None:
        dh, error = clip(dh, error, options.clip_state_grad)
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
            sums.append(verdict(name, value, total.flatten(), of_total.flatten()))
        dahat, error = gain * dn, _through_norm(gain.abs() * error, normal, scale)
        along = (dahat * normal).mean(-1, keepdim=True)
        wanted = scale * (dahat - dahat.mean(-1, keepdim=True) - normal * along)
    dw = torch.einsum("gtbi,gtbj->gij", da, case.before)
    terms = torch.einsum("gtbi,gtbj->gij", da.abs(), case.before.abs())
    verdicts = [
        verdict("dp", dp, *map(case.steps, (wanted, error))),
        verdict("dw_hh", dw_hh, *(x.reshape(dw_hh.shape) for x in (dw, case.error(terms, T * B)))),
        *sums,
    ]
    if dh_0 is not None:
        first, dropped = pick(da, case.first), pick(case.drops, case.first)
        into = torch.einsum("gbj,gji->gbi", first, case.w_hh)
        wanted = torch.where(dropped, 0, into)
        if given.states.h is not None:
            wanted = torch.where(case.empty, case.states_by_group(given.states.h), wanted)
        terms = torch.einsum("gbj,gji->gbi", first.abs(), case.w_hh.abs())
        error = case.error(torch.where(case.empty | dropped, 0, terms), S)
        error += torch.einsum("gbj,gji->gbi", pick(of_da, case.first), case.w_hh.abs())
        verdicts.append(verdict("dh_0", dh_0, *map(case.states, (wanted, error))))
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
    if CELLS[options.cell].saved:
        return gated.judge_record(given, kept, options, dp, record, u_operand)
    case = Case(kept, options, u_operand)
    da = case.by_group(dp)
    limit = options.clip_state_grad
    carry, state, _ = case.state_gradient(given, da, limit)
    clipped = state if limit is None else clip(*state, limit)
    preact = da, torch.finfo(dp.dtype).eps / 2 * da.abs()
    found = dict(zip(FIELDS, exact(record).unbind(-1)))
    verdicts = []
    for name, (x, error) in zip(
        ("state", "carry", "clipped", "preact"), (state, carry, clipped, preact)
    ):
        norm, of_norm = (case.over_units(v.square()).sqrt() for v in (x, error))
        of_norm = of_norm + case.error(norm, case.S * case.heads) / 2
        square = found[f"{name}_squares"]
        verdicts.append(verdict(f"record.{name}_norm", square.sqrt(), norm, of_norm))
    ones = case.masked(torch.ones_like(case.y))
    dh, error = state
    largest, of_largest = (case.by_direction(v.abs()).amax(-1) for v in (dh, error))
    slopes = case.masked(case.cell.gain(case.y, ()).abs())
    entries = case.over_units(ones)
    of_slopes = case.error(entries, case.S * case.heads)  # |f'| <= 1
    verdicts.append(verdict("record.state_max", found["state_max"], largest, of_largest))
    verdicts.append(verdict("record.gain", found["slopes"], case.over_units(slopes), of_slopes))
    for name, count in (
        ("nonfinite_grad", ~(dh.isfinite() & da.isfinite())),
        ("nonfinite_state", ~case.y.isfinite()),
        ("entries", ones),
        ("carried", torch.where(case.stops | case.at(case.last), 0, ones)),
    ):
        wanted = case.over_units(case.masked(count.double()))
        verdicts.append(verdict(f"record.{name}", found[name], wanted, None))
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
    da = exact(dp).flatten(0, 1)
    by = torch.ones_like(da[:, :1]) if factor is None else exact(factor).flatten(0, 1)
    u = u_operand or torch.finfo(arithmetic(dp.dtype)).eps / 2
    wanted, terms = ((f(da).T @ f(by)).view(value.shape) for f in (torch.positive, torch.abs))
    return verdict(name, value, wanted, 4 * math.sqrt(len(da)) * u * terms)


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
