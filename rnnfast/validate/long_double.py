"""A layer in long double (64 bits of mantissa), to judge float64 results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cases import Case

AVAILABLE = np.finfo(np.longdouble).nmant >= 63


def in_long_double(case: Case, bias: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """An independent oracle with x = p, W_ih = I: :data:`.layers.LAYER_RESULTS` of the layer, each
    as high + low, two float64."""
    given = (case.p, case.w_hh, case.h_0, case.grad_y, case.grad_h_n)
    x, w_hh, h_0, grad_y, grad_h_n = (v.numpy().astype(np.longdouble) for v in given)
    f, slope = {
        "tanh": (np.tanh, lambda h: 1 - h * h),
        "relu": (lambda a: np.maximum(a, 0), lambda h: 1.0 * (h > 0)),
        "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda h: h * (1 - h)),
        "softplus": (lambda a: np.logaddexp(a, 0), lambda h: -np.expm1(-h)),
    }[case.nonlinearity]
    (T, B, _), (D, H, _) = x.shape, w_hh.shape
    p = x + bias.numpy()
    y, dp = np.zeros_like(p), np.zeros_like(p)
    h_n, dw_hh, dh_0, dw_ih = (np.zeros_like(v) for v in (h_0, w_hh, h_0, w_hh))
    for d in range(D):
        columns, times = slice(d * H, (d + 1) * H), list(range(T))[:: -1 if d else 1]
        h = h_0[d]
        for t in times:
            h = y[t, :, columns] = f(p[t, :, columns] + h @ w_hh[d].T)
        h_n[d], carry = h, grad_h_n[d]
        for i in reversed(range(T)):
            t = times[i]
            before = y[times[i - 1], :, columns] if i else h_0[d]
            da = (carry + grad_y[t, :, columns]) * slope(y[t, :, columns])
            dp[t, :, columns], carry = da, da @ w_hh[d]
            dw_hh[d] += da.T @ before
            dw_ih[d] += da.T @ x[t, :, columns]
        dh_0[d] = carry
    db = dp.sum((0, 1)).reshape(D, H)

    def split(v) -> tuple[Tensor, Tensor]:
        high = v.astype(np.float64)
        return torch.from_numpy(high), torch.from_numpy((v - high).astype(np.float64))

    values = (y, h_n, dp.reshape(T, B, D, H).sum(2), dw_hh, dh_0, dw_ih, db, db)
    return tuple(map(split, values))
