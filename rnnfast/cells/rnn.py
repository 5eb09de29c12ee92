"""The Elman cell and its two loops over time, in plain PyTorch: the oracle of every backend.

Shapes: T time steps, B batch, D directions, H hidden size. Direction 1 runs in reverse real time.

    a_t = p_t + h_{t-1} W_hh^T,  h_t = f(a_t)                      (Elman 1990)

and, with g_t = dL/dh_t from outside, backpropagation through time (Werbos 1990):

    dh_t = g_t + da_{t+1} W_hh,  da_t = dh_t * f'(a_t)             f' from h_t alone

Nothing here is in place, and nothing depends on values: PyTorch can differentiate, vmap and trace
both loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATES = 1

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}

BACKWARD = {  # dh f'(a), from h = f(a) alone
    "tanh": lambda dh, h: dh * (1 - h * h),
    "relu": lambda dh, h: torch.where(h <= 0, 0, dh),  # as torch: an idle unit stops a NaN of dh
    "sigmoid": lambda dh, h: dh * (h * (1 - h)),
}


def forward(
    p: Tensor, w_hh: Tensor, h_0: Tensor | None, lengths: Tensor | None, nonlinearity: str
) -> tuple[Tensor, Tensor]:
    """All steps of all directions.

    Args:
        p: [T, B, D * H], the input projection.
        w_hh: [D, H, H].
        h_0: [D, B, H]; None for zeros.
        lengths: [B] int64; steps from lengths[b] on leave the state as it is and put out 0.

    Returns:
        y [T, B, D * H] and h_n [D, B, H].
    """
    T, B = p.shape[:2]
    D, H, _ = w_hh.shape
    f = NONLINEARITIES[nonlinearity]
    ys, h_ns = [], []
    for d in range(D):
        h = p.new_zeros(B, H) if h_0 is None else h_0[d]
        steps: list[Tensor] = []
        for t in _times(T, d):
            h_new = f(p[t, :, d * H : (d + 1) * H] + h @ w_hh[d].T)
            if lengths is None:
                h = h_new
                steps.append(h)
            else:
                valid = (t < lengths).unsqueeze(1)  # [B, 1]
                h = torch.where(valid, h_new, h)
                steps.append(torch.where(valid, h_new, 0))
        ys.append(torch.stack(steps[::-1] if d else steps))
        h_ns.append(h)
    return torch.cat(ys, -1), torch.stack(h_ns)


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    y: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`forward` from what it put out, as a function to differentiate again.

    Args:
        grad_y: [T, B, D * H] or None.
        grad_h_n: [D, B, H] or None.
        y: what forward returned; it carries the dependence on p.

    Returns:
        dp [T, B, D * H], dw_hh [D, H, H], dh_0 [D, B, H].
    """
    T, B = y.shape[:2]
    D, H, _ = w_hh.shape
    through = BACKWARD[nonlinearity]
    dps, dws, dh_0s = [], [], []
    for d in range(D):
        column = slice(d * H, (d + 1) * H)
        carry = y.new_zeros(B, H) if grad_h_n is None else grad_h_n[d]
        start = y.new_zeros(B, H) if h_0 is None else h_0[d]
        dw = torch.zeros_like(w_hh[d])
        das: list[Tensor] = []
        times = _times(T, d)
        for s in reversed(range(T)):
            t = times[s]
            h = y[t, :, column]
            dh = carry if grad_y is None else carry + grad_y[t, :, column]
            da = through(dh, h)
            h_before = y[times[s - 1], :, column] if s else start
            if lengths is not None:
                valid = (t < lengths).unsqueeze(1)
                da = torch.where(valid, da, 0)
                if d:  # the reverse direction of this row begins here
                    h_before = torch.where((t + 1 == lengths).unsqueeze(1), start, h_before)
                carry = torch.where(valid, da @ w_hh[d], carry)
            else:
                carry = da @ w_hh[d]
            dw = dw + da.T @ h_before
            das.append(da)
        dps.append(torch.stack(das if d else das[::-1]))
        dws.append(dw)
        dh_0s.append(carry)
    return torch.cat(dps, -1), torch.stack(dws), torch.stack(dh_0s)


def _times(T: int, direction: int) -> range:
    return range(T - 1, -1, -1) if direction else range(T)
