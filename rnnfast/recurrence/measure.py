"""The record of one step, as :mod:`rnnfast.recurrence.record` lays it out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .edges import where
from .record import FIELDS


class Step(NamedTuple):
    """Values of one backward step of one direction. Gradients of states hold all states,
    [n, B, S] each."""

    carries: tuple[Tensor, ...]  # from the step after
    grads: tuple[Tensor, ...]  # with what comes from outside
    clipped: tuple[Tensor, ...]
    da: Tensor  # [G, n, B, S]
    state: Tensor  # [n, B, S], as put out
    gain: Tensor  # [n, B, S], how much of the state comes straight through
    total: Tensor | None = None  # [n, B, S], gradient of the second state with its part through h


def measure(record: Tensor, step: Step, valid: Tensor | None, carried: Tensor | bool) -> None:
    """Fills record [N, fields]."""

    def over_units(*values: Tensor) -> Tensor:
        return sum(where(valid, x, 0).double().sum((0, 2)) for x in values)

    def squares(values: tuple[Tensor, ...] | Tensor) -> Tensor:
        return over_units(*(x.double().square() for x in values))

    state = step.state
    finite = step.da.isfinite().all(0)
    for grad in step.grads:
        finite = finite & grad.isfinite()
    ones = torch.ones_like(state)
    zero = torch.zeros(state.shape[1], dtype=torch.float64, device=state.device)
    largest = [where(valid, grad.abs(), 0).double().amax((0, 2)) for grad in step.grads]
    values = {
        "state_squares": squares(step.grads),
        "carry_squares": squares(step.carries),
        "clipped_squares": squares(step.clipped),
        "preact_squares": squares(step.da),
        "state_max": torch.stack(largest).amax(0) if len(largest) > 1 else largest[0],
        "slopes": over_units(step.gain.abs()),
        "nonfinite_grad": over_units(~finite),
        "nonfinite_state": over_units(~state.isfinite()),
        "entries": over_units(ones),
        "carried": over_units(where(carried, ones, torch.zeros_like(state))),
        "cell_squares": zero if step.total is None else squares((step.total,)),
        "cell_carry_squares": zero if step.total is None else squares(step.carries[1:]),
    }
    rows = torch.stack([values[name] for name in FIELDS], -1).detach()
    if record.shape[0] != rows.shape[0]:
        largest = rows[:, FIELDS.index("state_max")]
        rows = rows.sum(0, keepdim=True)
        if len(largest):  # an empty batch has none
            rows[0, FIELDS.index("state_max")] = largest.amax(0)
    record.copy_(rows)
