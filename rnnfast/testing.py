"""The judge of a recurrence: its errors against float64, per time step, with the worst step named.

A score over a whole sequence hides a wrong step: at T = 2000, B = 64 a zeroed h[0, 0, :] is 1e-5 of
it. So there are two budgets, and a result has to keep within both.

Steps (:func:`judge_forward`, :func:`judge_backward`): each step is taken again in float64 from what
the kernel itself put out before it, and every element has

    |error| <= 2 u_store |result| + 4 sqrt(K) u_operand sum of |terms|

u being the unit roundoff of the stored dtype and of the operands (float32 for narrower storage), K
the number of products in the sum. Any case may be judged, since no error is carried along.

Sequences (:func:`error_ratio`): the worst step's RMS error over a whole sequence against float64,
as a multiple of what torch's own nn.RNN makes on the same input; for contracting recurrences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .cells.rnn import BACKWARD, NONLINEARITIES


class Verdict(NamedTuple):
    """How far one tensor is from its budget, and where it is furthest."""

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
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    y: Tensor,
    h_n: Tensor,
    *,
    u_operand: float | None = None,
) -> list[Verdict]:
    """Judges y [T, B, D * H] and h_n [D, B, H], each step restarted from the y before it.

    Past a row's length y must be 0; h_n must be the last valid y (or h_0), to the bit.
    """
    case = _Case(y, w_hh, h_0, lengths, u_operand)
    p = _by_direction(p, case.D)  # [D, T, B, H]
    wanted_n = torch.where(case.empty, case.h_0, _pick(case.y, case.last))
    a = p + torch.einsum("dtbj,dij->dtbi", case.before, case.w_hh)
    terms = p.abs() + torch.einsum("dtbj,dij->dtbi", case.before.abs(), case.w_hh.abs())
    h = NONLINEARITIES[nonlinearity](a)
    wanted, terms = case.masked(h), case.masked(terms)
    return [
        case.verdict("y", y, _side_by_side(wanted), _side_by_side(terms), case.H),
        case.verdict("h_n", h_n, wanted_n, None, 0),
    ]


def judge_backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    dp: Tensor,
    dw_hh: Tensor,
    dh_0: Tensor | None,
    *,
    u_operand: float | None = None,
) -> list[Verdict]:
    """Judges dp [T, B, D * H], each step restarted from the dp after it; dh_0 and dw_hh from dp."""
    case = _Case(y, w_hh, h_0, lengths, u_operand)
    T, B, D, H = *y.shape[:2], case.D, case.H
    zeros = torch.zeros(D, B, H, dtype=torch.float64)
    g_n = zeros if grad_h_n is None else _exact(grad_h_n)
    g = zeros.unsqueeze(1).expand(D, T, B, H) if grad_y is None else _by_direction(grad_y, D)
    da = _by_direction(dp, D)
    after = torch.zeros_like(da)  # da of the step that BPTT takes before this one
    after[0, :-1] = da[0, 1:]
    after[1:, 1:] = da[1:, :-1]
    ends = case.at(case.last)

    def carry(after: Tensor, w: Tensor, enters: Tensor) -> Tensor:
        return torch.where(ends, enters.unsqueeze(1), torch.einsum("dtbj,dji->dtbi", after, w))

    dh = g + carry(after, case.w_hh, g_n)
    terms = g.abs() + carry(after.abs(), case.w_hh.abs(), g_n.abs())
    wanted = case.masked(BACKWARD[nonlinearity](dh, case.y))
    terms = case.masked(terms)
    first = _pick(da, case.first)
    wanted_0 = torch.where(case.empty, g_n, torch.einsum("dbj,dji->dbi", first, case.w_hh))
    terms_0 = torch.einsum("dbj,dji->dbi", first.abs(), case.w_hh.abs())
    terms_0 = torch.where(case.empty, 0, terms_0)
    dw = torch.einsum("dtbi,dtbj->dij", da, case.before)
    terms_w = torch.einsum("dtbi,dtbj->dij", da.abs(), case.before.abs())
    verdicts = [
        case.verdict("dp", dp, _side_by_side(wanted), _side_by_side(terms), H),
        case.verdict("dw_hh", dw_hh, dw, terms_w, T * B),
    ]
    if dh_0 is not None:
        verdicts.append(case.verdict("dh_0", dh_0, wanted_0, terms_0, H))
    return verdicts


class _Case:
    """The kernel's own outputs in float64, by direction: [D, T, B, H]."""

    def __init__(
        self,
        y: Tensor,
        w_hh: Tensor,
        h_0: Tensor | None,
        lengths: Tensor | None,
        u_operand: float | None,
    ) -> None:
        T, B, _ = y.shape
        self.D, self.H, _ = D, H, _ = w_hh.shape
        self.u_store = torch.finfo(y.dtype).eps / 2
        float32 = torch.finfo(torch.float32).eps / 2
        self.u_operand = min(self.u_store, float32) if u_operand is None else u_operand
        self.y, self.w_hh = _by_direction(y, D), _exact(w_hh)
        self.h_0 = torch.zeros(D, B, H).double() if h_0 is None else _exact(h_0)
        lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
        self.valid = (torch.arange(T).unsqueeze(1) < lengths).view(1, T, B, 1)
        self.empty = (lengths == 0).view(1, B, 1)
        begin, end = torch.zeros(B, dtype=torch.int64), (lengths - 1).clamp(min=0)
        self.first = torch.stack([begin, end][:D]).unsqueeze(1)  # [D, 1, B], real time
        self.last = torch.stack([end, begin][:D]).unsqueeze(1)
        before = torch.zeros_like(self.y)
        before[0, 1:] = self.y[0, :-1]
        before[1:, :-1] = self.y[1:, 1:]
        start = torch.where(self.at(self.first), self.h_0.unsqueeze(1), before)
        self.before = self.masked(start)

    def at(self, times: Tensor) -> Tensor:
        """Where the steps of times [D, 1, B] are: [D, T, B, 1]."""
        return (torch.arange(self.y.shape[1]).view(1, -1, 1) == times).unsqueeze(-1)

    def masked(self, x: Tensor) -> Tensor:
        return torch.where(self.valid, x, 0)

    def verdict(
        self, name: str, value: Tensor, wanted: Tensor, terms: Tensor | None, products: int
    ) -> Verdict:
        """terms None: to the bit."""
        error = (_exact(value) - wanted).abs()
        if terms is None:
            allowed = torch.zeros_like(error)
        else:
            info = torch.finfo(value.dtype)  # and below it u has no meaning
            least = torch.where(terms == 0, 0, info.smallest_normal * info.eps)
            allowed = 2 * self.u_store * wanted.abs() + least
            allowed += 4 * math.sqrt(products) * self.u_operand * terms
        ratio = torch.where(error == 0, 0, error / allowed)
        if not ratio.numel():
            return Verdict(name, 0.0, (), 0.0, 0.0)
        ratio = torch.where(ratio.isnan(), math.inf, ratio)  # a NaN is the worst there is
        at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        return Verdict(name, ratio[at].item(), at, value[at].item(), wanted[at].item())


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _by_direction(x: Tensor, D: int) -> Tensor:
    """[T, B, D * H] -> [D, T, B, H] in float64."""
    return torch.stack(_exact(x).chunk(D, -1))


def _side_by_side(x: Tensor) -> Tensor:
    return torch.cat(list(x), -1)


def _pick(x: Tensor, times: Tensor) -> Tensor:
    """x [D, T, B, H] at times [D, 1, B] -> [D, B, H]."""
    return x.gather(1, times.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])).squeeze(1)


class StepError(NamedTuple):
    """The largest RMS error of a time step, and which step that is."""

    rms: float
    t: int


def worst_step(runs: Iterable[tuple[Tensor, Tensor]]) -> StepError:
    """RMS over batch and units at each step, pooled over runs of one shape; the largest.

    Args:
        runs: (result, float64 result), each [T, ...]; what has no time axis comes in as [1, ...].
    """
    squares = [(_exact(r) - _exact(e)).square().flatten(1).mean(1) for r, e in runs]
    rms = torch.stack(squares).mean(0).sqrt()
    t = int(rms.argmax())  # a NaN counts as the largest
    return StepError(rms[t].item(), t)


def error_ratio(ours: StepError, theirs: StepError) -> float:
    """Error against error; 1 where neither makes any."""
    if ours.rms == theirs.rms == 0:
        return 1.0
    return math.inf if theirs.rms == 0 else ours.rms / theirs.rms
