"""Errors of the GPU kernels' float32 sigmoid, if instructions err as far as PTX allows.

    .venv/bin/python bench/ladder/cuda_sigmoid.py

Prints the worst error as a part of the budget of one unit (2 u of the result, 4 u of the argument,
u = 2^-24), and the RMS error in u where |x| < 1 and where |x| < 20, of each variant and of torch's.
The approximate instructions are off by a random part of their bound: ex2 2 ulp, rcp 1 ulp.
"""

from __future__ import annotations

import numpy as np
import torch

U = 2.0**-24
RANDOM = np.random.default_rng(0)
RANGES = (1e-3, 1.0, 20.0)


def approximate(exact: np.ndarray, ulps: float) -> np.ndarray:
    ulp = np.exp2(np.floor(np.log2(np.abs(exact))) - 23)
    return (exact + RANDOM.uniform(-ulps, ulps, exact.shape) * ulp).astype(np.float32)


def exp(x: np.ndarray) -> np.ndarray:
    return approximate(np.exp2((x * np.float32(1.4426950408889634)).astype(np.float64)), 2)


def reciprocal(x: np.ndarray) -> np.ndarray:
    return approximate(1 / x.astype(np.float64), 1)


def fraction(x: np.ndarray) -> np.ndarray:
    return reciprocal(1 + exp(-x))


def tanh_near_zero(x: np.ndarray) -> np.ndarray:
    z, c = x * x, np.float32
    y = c(0.021007313887361264955) + z * c(-0.0061796007726469633011)
    y = c(0.1333245195930986894) + z * (c(-0.05383736598596564407) + z * y)
    return x + x * z * (c(-0.33333313879465202036) + z * y)


def near_zero_by_tanh(x: np.ndarray) -> np.ndarray:
    e = exp(-np.abs(x))
    return chosen(x, e, reciprocal(1 + e))


def and_a_newton_step(x: np.ndarray) -> np.ndarray:
    e = exp(-np.abs(x))
    d, r = (1 + e).astype(np.float64), reciprocal(1 + e)
    off = (1 - d * r).astype(np.float32)  # of fused products
    return chosen(x, e, (r + r.astype(np.float64) * off).astype(np.float32))


def chosen(x: np.ndarray, e: np.ndarray, r: np.ndarray) -> np.ndarray:
    half = np.float32(0.5)
    near = half + half * tanh_near_zero(half * x)
    return np.where(np.abs(x) <= 1.125, near, np.where(x < 0, e * r, r))


def by_torch(x: np.ndarray) -> np.ndarray:
    return torch.sigmoid(torch.from_numpy(x)).numpy()


def main() -> None:
    print(f"{'variant':20}  of the budget  RMS error in u, |x| < " + ", ".join(map(str, RANGES)))
    for variant in (fraction, near_zero_by_tanh, and_a_newton_step, by_torch):
        ratio, rms = 0.0, []
        for most in RANGES:
            x = RANDOM.uniform(-most, most, 400_000).astype(np.float32)
            exact = 1 / (1 + np.exp(-x.astype(np.float64)))
            error = np.abs(variant(x) - exact)
            ratio = max(ratio, (error / (2 * U * exact + 4 * U * np.abs(x))).max())
            rms.append(np.sqrt(np.mean((error / U) ** 2)))
        errors = ", ".join(f"{value:.2f}" for value in rms)
        print(f"{variant.__name__:20}  {ratio:13.2f}  {errors}")


if __name__ == "__main__":
    main()
