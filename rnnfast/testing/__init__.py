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

A cell with gates is judged by its own formulas, run on numbers that carry their error bound
(:mod:`rnnfast.testing.gated`).

Sequences (:func:`error_ratio`): the worst step's RMS error over a whole sequence against float64,
as a multiple of what torch's own nn.RNN makes on the same input; for contracting recurrences.
"""

from .case import Verdict
from .sequences import StepError, error_ratio, step_errors, worst_step
from .steps import judge_backward, judge_forward, judge_record, judge_sum

__all__ = [
    "StepError",
    "Verdict",
    "error_ratio",
    "judge_backward",
    "judge_forward",
    "judge_record",
    "judge_sum",
    "step_errors",
    "worst_step",
]
