"""No time for a wrong result: every provider is judged against float64 before it is timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnnfast.cells.rnn import Options
from rnnfast.testing import Verdict, judge_backward, judge_forward

from .points import Point
from .providers import Layer, Problem, make_problem

ELEMENTS, PRODUCTS = 5e5, 4e8  # T * B * H and T * B * H^2 at most: the judge computes in float64


def gate_problem(point: Point) -> Problem:
    """The point's own H, and its T and B as far as the judge can follow.

    W_ih = I and no biases, so that p = x and dx = dp hold to the bit, and the judge of the
    recurrence can judge a layer.
    """
    T, B, H = point[:3]
    rows = max(4, int(min(ELEMENTS / H, PRODUCTS / H**2)))
    T = min(T, max(2, rows // B))
    problem = make_problem(T, min(B, rows // T), H)
    zeros = torch.zeros(H)
    return problem._replace(w_ih=torch.eye(H), b_ih=zeros, b_hh=zeros)


def complaints(layer: Layer, problem: Problem) -> list[str]:
    """What is outside of its error budget; [] if nothing is."""
    r = layer.results()
    w_hh = problem.w_hh.unsqueeze(0)
    dx = r["dx"]
    verdicts = [
        *judge_forward(problem.x, w_hh, *[None] * 5, Options(), r["y"], r["h_n"]),
        *judge_backward(
            *(problem.g, None, r["y"], w_hh, *[None] * 7, Options()),
            *(dx, r["dw_hh"].unsqueeze(0)),
        ),
        _judge_sum("dw_ih", r["dw_ih"], dx, problem.x),
    ]
    ones = torch.ones_like(dx[..., :1])
    verdicts += [_judge_sum(name, r[name], dx, ones) for name in ("db_ih", "db_hh")]
    return [str(verdict) for verdict in verdicts if not verdict.good]


def _judge_sum(name: str, value: Tensor, dp: Tensor, factor: Tensor) -> Verdict:
    """A gradient that is a sum over t and b of dp times a factor, on the budget of dw_hh."""
    dp, factor = dp.double().flatten(0, 1), factor.double().flatten(0, 1)
    wanted, terms = dp.T @ factor, dp.abs().T @ factor.abs()
    value = value.double().view_as(wanted)
    u = torch.finfo(torch.float32).eps / 2
    allowed = 2 * u * wanted.abs() + 4 * math.sqrt(len(dp)) * u * terms
    error = (value - wanted).abs()
    ratio = torch.where(error == 0, 0, error / allowed).nan_to_num(math.inf, math.inf)
    at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    return Verdict(name, ratio[at].item(), at, value[at].item(), wanted[at].item())
