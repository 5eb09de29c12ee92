"""No time for a wrong result: every provider is judged against float64 before it is timed."""

from __future__ import annotations

import torch

from rnnfast.cells.rnn import Options
from rnnfast.testing import judge_backward, judge_forward, judge_sum

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
        judge_sum("dw_ih", r["dw_ih"], dx, problem.x),
        *(judge_sum(name, r[name], dx) for name in ("db_ih", "db_hh")),
    ]
    return [str(verdict) for verdict in verdicts if not verdict.good]
