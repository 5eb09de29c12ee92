"""The oracle as a backend: any device, any dtype; PyTorch itself differentiates it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..cells import rnn as cell

if TYPE_CHECKING:
    from . import Problem


def unavailable(problem: Problem) -> str:
    return ""


def forward(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`rnnfast.autograd.layer`."""
    p = x if w_ih is None else F.linear(x, w_ih, None if b_ih is None else b_ih + b_hh)
    return cell.forward(p, _by_direction(w_hh), h_0, lengths, nonlinearity)


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
    nonlinearity: str,
) -> tuple[Tensor | None, ...]:
    """As :func:`rnnfast.backends.cpu.backward`, but functions to differentiate again."""
    inputs = (grad_y, grad_h_n, y, _by_direction(w_hh), h_0, lengths, nonlinearity)
    dp, dw_hh, dh_0 = cell.backward(*inputs)
    dw_hh = dw_hh.view_as(w_hh) if dw_wanted else None
    if w_ih is None:
        return dp if dx_wanted else None, None, None, None, dw_hh, dh_0
    dx = dp @ w_ih if dx_wanted else None
    if not dw_wanted:
        return dx, None, None, None, None, dh_0
    db = dp.sum((0, 1))
    return dx, dp.flatten(0, 1).T @ x.flatten(0, 1), db, db.clone(), dw_hh, dh_0


def _by_direction(w_hh: Tensor) -> Tensor:
    return w_hh if w_hh.dim() == 3 else w_hh.unsqueeze(0)
