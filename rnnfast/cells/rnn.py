"""The Elman cell (Elman 1990): h_t = f(a_t), with f' taken from h_t alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cell import Cell, StepGradients, Tensors


def softplus(a: Tensor) -> Tensor:
    """log(1 + exp(a)). Beyond 40 it is a in float64, too; beyond 20, torch's threshold, not yet."""
    return torch.nn.functional.softplus(a, threshold=40)


NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
}

BACKWARD = {  # dh f'(a), from h = f(a)
    "tanh": lambda dh, h: dh * (1 - h * h),
    "relu": lambda dh, h: torch.where(h <= 0, 0, dh),  # as torch: an idle unit stops a NaN of dh
    "sigmoid": lambda dh, h: dh * (h * (1 - h)),
    "softplus": lambda dh, h: dh * -torch.expm1(-h),
}
STEEPEST = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "softplus": 1.0}  # the largest f'
SIGN_ALONE = {"relu"}  # f' needs the sign of h alone


def _cell(nonlinearity: str) -> Cell:
    f: Callable[[Tensor], Tensor] = NONLINEARITIES[nonlinearity]
    through = BACKWARD[nonlinearity]
    recomputes = nonlinearity not in SIGN_ALONE

    def step(a: Tensor, u: Tensor, before: Tensors, parameters: Tensors) -> tuple[Tensors, Tensors]:
        return (f(a[0]),), ()

    def step_back(
        grads: Tensors, before: Tensors, h: Tensor, saved: Tensors, a: Tensor | None, _: Tensors
    ) -> StepGradients:
        # An h that was rounded to be stored has few digits of f' left where f is flat, and dgamma
        # is the sum of such losses. A norm has saved ahat, and f(a) from it is exact enough: the
        # flatter f is, the less the rounding of ahat matters.
        if recomputes and a is not None and h.dtype != a.dtype:
            h = f(a[0])
        return StepGradients(through(grads[0], h)[None])

    def gain(h: Tensor, saved: Tensors) -> Tensor:
        return through(torch.ones_like(h), h)

    name = f"rnn_{nonlinearity}"
    return Cell(
        name,
        ("a",),
        ("h",),
        step,
        step_back,
        gain,
        recomputes=recomputes,
        steepest=STEEPEST[nonlinearity],
        idles=nonlinearity == "relu",
    )


CELLS = tuple(_cell(nonlinearity) for nonlinearity in NONLINEARITIES)
