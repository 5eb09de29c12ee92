"""f(n), and dh f'(n) from h = f(n): pointwise, in float32. F is the name of f."""

from __future__ import annotations

import triton
import triton.language as tl

NONLINEARITIES = ("tanh", "relu", "sigmoid")


@triton.jit
def activation(b_n, F: tl.constexpr):
    """f(n)."""
    if F == "tanh":
        return _tanh(b_n)
    elif F == "relu":
        return tl.where(b_n < 0, 0.0, b_n)  # a maximum would lose a NaN; this keeps it
    else:
        return _sigmoid(b_n)


@triton.jit
def times_slope(b_dh, b_h, F: tl.constexpr):
    """dh f'(n)."""
    if F == "tanh":
        return b_dh * (1.0 - b_h * b_h)
    elif F == "relu":
        return tl.where(b_h <= 0, 0.0, b_dh)  # a product would let a NaN of dh through an idle unit
    else:
        return b_dh * (b_h * (1.0 - b_h))


@triton.jit
def _tanh(b_n):
    # Two formulas, as on the CPU (bench/ladder/activations.md): 1 - 2 / (1 + exp(2 |n|)) loses
    # digits near zero.
    b_magnitude = tl.abs(b_n)
    b_far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * b_magnitude))
    b_far = tl.where(b_n < 0, -b_far, b_far)
    return tl.where(b_magnitude <= 0.5625, _tanh_near_zero(b_n), b_far)


@triton.jit
def _tanh_near_zero(b_n):
    # The CPU's polynomial, for |n| <= 0.5625.
    b_z = b_n * b_n
    b_y = 0.021007313887361264955 + b_z * -0.0061796007726469633011
    b_y = 0.1333245195930986894 + b_z * (-0.05383736598596564407 + b_z * b_y)
    return b_n + b_n * b_z * (-0.33333313879465202036 + b_z * b_y)


@triton.jit
def _sigmoid(b_n):
    # As the CUDA kernels: exp and the division err by more than float32's rounding.
    b_magnitude = tl.abs(b_n)
    b_near = 0.5 + 0.5 * _tanh_near_zero(0.5 * b_n)
    b_e = tl.exp(-b_magnitude)
    b_r = 1.0 / (1.0 + b_e)
    b_r = tl.fma(b_r, tl.fma(-(1.0 + b_e), b_r, 1.0), b_r)  # a step of Newton's method
    return tl.where(b_magnitude <= 1.125, b_near, tl.where(b_n < 0, b_e * b_r, b_r))
