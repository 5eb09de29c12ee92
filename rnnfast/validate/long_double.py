"""A layer in long double (64 bits of mantissa), to judge float64 results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cases import Case

AVAILABLE = np.finfo(np.longdouble).nmant >= 63


def in_long_double(case: Case, bias: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """An independent oracle with x = p, W_ih = I: :data:`.layers.LAYER_RESULTS` of the layer, each
    as high + low, two float64."""
    x, w_hh, grad_y = map(_long, (case.p, case.w_hh, case.grad_y))
    starts = [_long(s) for s in case.states if s is not None]
    ends = [_long(g) for g in case.given.states if g is not None]
    (T, B, _), (D, rows, H) = x.shape, w_hh.shape
    cell = GATED.get(case.options.cell) or _Elman(case.nonlinearity)
    b_hh = np.zeros((D, rows)) if case.b_hh is None else case.b_hh.numpy().reshape(D, rows)
    p = x + bias.numpy()
    y, dp = np.zeros((T, B, D * H), np.longdouble), np.zeros_like(p)
    dw_hh, dw_ih = np.zeros_like(w_hh), np.zeros((D, rows, rows), np.longdouble)
    db_hh, lasts, firsts = np.zeros((D, rows), np.longdouble), [], []
    for d in range(D):
        gates, columns = slice(d * rows, (d + 1) * rows), slice(d * H, (d + 1) * H)
        times = list(range(T))[:: -1 if d else 1]
        states, kept = [s[d] for s in starts], []
        for t in times:
            u, before = states[0] @ w_hh[d].T + b_hh[d], states
            states, saved = cell.step(p[t, :, gates], u, states)
            kept.append((before, saved, states))
            y[t, :, columns] = states[0]
        lasts.append(states)
        grads = [g[d] for g in ends]
        for t, (before, saved, after) in zip(times[::-1], kept[::-1]):
            grads[0] = grads[0] + grad_y[t, :, columns]
            dp[t, :, gates], du, direct = cell.step_back(grads, before, saved, after)
            grads = [direct[0] + du @ w_hh[d], *direct[1:]]
            dw_hh[d] += du.T @ before[0]
            db_hh[d] += du.sum(0)
            dw_ih[d] += dp[t, :, gates].T @ x[t, :, gates]
        firsts.append(grads)
    found = {"y": y, "dx": dp.reshape(T, B, D, rows).sum(2), "dw_hh": dw_hh, "dw_ih": dw_ih}
    found |= {"db_ih": dp.sum((0, 1)).reshape(D, rows), "db_hh": db_hh}
    for name, last, first in zip("hc", zip(*lasts), zip(*firsts)):
        found |= {f"{name}_n": np.stack(last), f"d{name}_0": np.stack(first)}
    return {name: _split(v) for name, v in found.items()}


def _long(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.longdouble)


def _split(v: np.ndarray) -> tuple[Tensor, Tensor]:
    high = v.astype(np.float64)
    return torch.from_numpy(high), torch.from_numpy((v - high).astype(np.float64))


class _Elman:
    def __init__(self, nonlinearity: str) -> None:
        self.f, self.slope = {
            "tanh": (np.tanh, lambda h: 1 - h * h),
            "relu": (lambda a: np.maximum(a, 0), lambda h: 1.0 * (h > 0)),
            "sigmoid": (_sigmoid, lambda h: h * (1 - h)),
            "softplus": (lambda a: np.logaddexp(a, 0), lambda h: -np.expm1(-h)),
        }[nonlinearity]

    def step(self, p, u, states):
        return [self.f(p + u)], ()

    def step_back(self, grads, before, saved, after):
        da = grads[0] * self.slope(after[0])
        return da, da, [0]


class _LSTM:
    def step(self, p, u, states):
        i, f, g, o = np.split(p + u, 4, -1)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        c = f * states[1] + i * g
        return [o * np.tanh(c), c], (i, f, g, o)

    def step_back(self, grads, before, saved, after):
        (dh, dc), (i, f, g, o), (_, c) = grads, saved, after
        dc = dc + dh * o * (1 - np.tanh(c) ** 2)
        di, df, dg, do = dc * g, dc * before[1], dc * i, dh * np.tanh(c)
        da = di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)
        da = np.concatenate(da, -1)
        return da, da, [0, dc * f]


class _GRU:
    def step(self, p, u, states):
        (r, z, n), (u_r, u_z, u_n) = np.split(p, 3, -1), np.split(u, 3, -1)
        r, z = _sigmoid(r + u_r), _sigmoid(z + u_z)
        n = np.tanh(n + r * u_n)
        return [(1 - z) * n + z * states[0]], (r, z, n, u_n)

    def step_back(self, grads, before, saved, after):
        (dh,), (r, z, n, u_n) = grads, saved
        dn = dh * (1 - z) * (1 - n * n)
        dr, dz = dn * u_n * r * (1 - r), dh * (before[0] - n) * z * (1 - z)
        return np.concatenate([dr, dz, dn], -1), np.concatenate([dr, dz, dn * r], -1), [dh * z]


GATED = {"lstm": _LSTM(), "gru": _GRU()}


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))
