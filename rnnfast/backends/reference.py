"""The oracle as a backend: any device, any dtype; PyTorch itself differentiates it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..cells import rnn as cell
from ..cells.rnn import Options
from ..recurrence.tensors import without_padding

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
    gamma: Tensor | None,
    beta: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As :func:`rnnfast.ops.layer`, and ahat and rstd with layer norm."""
    x = without_padding(x, lengths)
    p = x if w_ih is None else F.linear(x, w_ih, None if b_ih is None else b_ih + b_hh)
    return cell.forward(p, _by_direction(w_hh), gamma, beta, h_0, lengths, reset, options)


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    ahat: Tensor | None,
    rstd: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    record: Tensor | None,
    dx_wanted: bool,
    dw_wanted: bool,
    options: Options,
    grad_ahat: Tensor | None = None,
    grad_rstd: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """As :func:`rnnfast.backends.cpu.backward`, but functions to differentiate again."""
    inputs = (grad_y, grad_h_n, grad_ahat, grad_rstd, y, _by_direction(w_hh), gamma, beta)
    inputs += (ahat, rstd, h_0, lengths, reset, options, record)
    dp, dw_hh, *d_norm, dh_0 = cell.backward(*inputs)
    dh_0 = None if h_0 is None else dh_0
    dw_hh, *d_norm = (dw_hh.view_as(w_hh), *d_norm) if dw_wanted else (None, None, None)
    if w_ih is None:
        return dp if dx_wanted else None, None, None, None, dw_hh, *d_norm, dh_0
    dx = dp @ w_ih if dx_wanted else None
    if not dw_wanted:
        return dx, None, None, None, None, None, None, dh_0
    db = dp.sum((0, 1))
    T, B, width = dp.shape  # reshape: is_grads_batched cannot map flatten
    x = without_padding(x, lengths).reshape(T * B, x.shape[2])
    dw_ih = dp.reshape(T * B, width).T @ x
    return dx, dw_ih, db, db.clone(), dw_hh, *d_norm, dh_0


def _by_direction(w_hh: Tensor) -> Tensor:
    return w_hh if w_hh.dim() == 3 else w_hh.unsqueeze(0)
