"""Errors of whole sequences against float64, worst step first, beside torch's own error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .case import exact


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
    squares = [(exact(r) - exact(e)).square().flatten(1).mean(1) for r, e in runs]
    return torch.stack(squares).mean(0).sqrt()


def error_ratio(ours: StepError, theirs: StepError) -> float:
    """Our error over theirs; 1 if both are 0."""
    if ours.rms == theirs.rms == 0:
        return 1.0
    return math.inf if theirs.rms == 0 else ours.rms / theirs.rms
