"""The products over all steps of a sequence, which torch computes (cuBLAS on a GPU), before and
after a kernel that has the recurrence alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import Kept, Options, Wanted, Weights
from .tensors import empty_rows, with_dense_rows, without_padding


def projected(x: Tensor, weights: Weights) -> Tensor:
    """p [T, B, D * H], in the memory order of x; x itself where there is no w_ih."""
    w_ih, b_ih, b_hh = weights[:3]
    if w_ih is not None:
        bias = None if b_ih is None else b_ih + b_hh
        if x.stride(1) > x.stride(0):  # batch first in memory: F.linear would copy it
            x = F.linear(x.transpose(0, 1), w_ih, bias).transpose(0, 1)
        else:
            x = F.linear(x, w_ih, bias)
    return with_dense_rows(x)


def dw_hh(dp: Tensor, kept: Kept, options: Options) -> Tensor:
    """sum_t da_t^T h_{t-1}, with h_{t-1} as the step read it."""
    y, w_hh, h_0, (lengths, reset) = kept.y, kept.weights.w_hh, kept.states.h, kept.rows
    T, B, width = y.shape
    D, heads = options.directions, options.heads
    H = width // D
    if h_0 is not None and lengths is not None:  # rows without steps add nothing, not even inf
        h_0 = h_0.masked_fill((lengths == 0).view(1, B, 1), 0)
    before = empty_rows(y, width)
    before[1:, :, :H], before[0, :, :H] = y[:-1, :, :H], 0 if h_0 is None else h_0[0]
    if D == 2:
        before[:-1, :, H:], before[-1, :, H:] = y[1:, :, H:], 0
        if h_0 is not None:  # where a row begins; one without steps takes no gradient
            rows = torch.arange(B, device=y.device)
            begins = rows.new_full((B,), T - 1) if lengths is None else (lengths - 1).clamp(min=0)
            before[begins, rows, H:] = h_0[1]
    if reset is not None:
        before[..., :H].masked_fill_(reset.unsqueeze(-1), 0)
        if D == 2:
            inside = reset[1:]
            if lengths is not None:
                steps = torch.arange(1, T, device=y.device).unsqueeze(1)
                inside = inside & (steps < lengths)
            before[:-1, :, H:].masked_fill_(inside.unsqueeze(-1), 0)
    S = H // heads
    da, before = (v.view(T * B, D * heads, S) for v in (dp, before))
    return torch.bmm(da.permute(1, 2, 0), before.permute(1, 0, 2)).view_as(w_hh)


def projected_back(
    dp: Tensor, kept: Kept, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw_ih, db_ih, db_hh."""
    w_ih = kept.weights.w_ih
    if w_ih is None:
        return dp if wanted.x else None, None, None, None
    dx = dp @ w_ih if wanted.x else None
    if not wanted.weights:
        return dx, None, None, None
    da = dp.flatten(0, 1)
    db = da.sum(0)
    x = without_padding(kept.x, kept.rows.lengths)
    return dx, da.T @ x.flatten(0, 1), db, db.clone()
