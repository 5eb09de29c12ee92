"""The GRU cell of torch and cuDNN (Cho et al. 2014, the reset gate behind W_hn h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Cell, StepGradients, Tensors


def _step(a: Tensor, u: Tensor, before: Tensors, parameters: Tensors) -> tuple[Tensors, Tensors]:
    r, a_z = a[0].sigmoid(), a[1]
    n = (a[2] + r * u[2]).tanh()
    # a_z, not z: in 16 bits a z of 0.999 is stored as 1, and nothing would be forgotten.
    return (n + a_z.sigmoid() * (before[0] - n),), (r, a_z, n, u[2])


def _step_back(
    grads: Tensors, before: Tensors, h: Tensor, saved: Tensors, a: Tensor | None, _: Tensors
) -> StepGradients:
    (dh,), (r, a_z, n, u_n) = grads, saved
    z = a_z.sigmoid()
    rest = (-a_z).sigmoid()  # 1 - z, exact near z = 1
    dn = dh * rest * (1 - n * n)
    dr = dn * u_n * (r * (1 - r))
    dz = dh * (before[0] - n) * (z * rest)
    return StepGradients(torch.stack([dr, dz, dn]), torch.stack([dr, dz, dn * r]), (dh * z,))


def _saved_back(grads: Tensors, saved: Tensors) -> StepGradients:
    (of_r, of_z, of_n, of_u), (r, _, n, u_n) = grads, saved
    dn = of_n * (1 - n * n)
    dr = (of_r + dn * u_n) * (r * (1 - r))
    return StepGradients(torch.stack([dr, of_z, dn]), torch.stack([dr, of_z, dn * r + of_u]))


def _gain(h: Tensor, saved: Tensors) -> Tensor:
    return saved[1].sigmoid()


GRU = Cell(
    name="gru",
    gates=("r", "z", "n"),
    states=("h",),
    step=_step,
    step_back=_step_back,
    gain=_gain,
    saved=("r", "a_z", "n", "u_n"),
    saved_back=_saved_back,
    apart=("n",),
    norm="recurrent",
    gain_name="z",
)
CELLS = (GRU,)
