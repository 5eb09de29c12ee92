"""The coefficients in csrc/cpu/math.h: minimax fits by Lawson's weighted least squares.

    pip install mpmath numpy && python bench/ladder/polynomials.py

tanh(x) = x (1 + z P(z)), z = x^2, |x| <= 0.625, and exp(r) = 1 + r + r^2 Q(r), |r| <= ln(2)/2.
Each is fitted to the relative error of the whole function, which is what an ulp measures.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 40
POINTS = 400
ROUNDS = 300


def lawson(xs, target, weight, degree):
    """Coefficients, lowest first, that minimise max |weight (target - poly)| on xs."""
    basis = np.vander(xs, degree + 1, increasing=True)
    emphasis = np.full(len(xs), 1 / len(xs))
    best, least = None, np.inf
    for _ in range(ROUNDS):
        row = weight * np.sqrt(emphasis)
        scale = np.abs(basis).max(axis=0)
        coefficients = np.linalg.lstsq(basis / scale * row[:, None], target * row, rcond=None)[0]
        coefficients = coefficients / scale
        error = np.abs(weight * (target - basis @ coefficients))
        if error.max() < least:
            best, least = coefficients, error.max()
        emphasis = emphasis * error
        emphasis /= emphasis.sum()
    return best, least


def chebyshev(low, high):
    angles = (np.arange(POINTS) + 0.5) * np.pi / POINTS
    return (low + high) / 2 + (high - low) / 2 * np.cos(angles)


def fit_tanh(degree=5):
    zs = chebyshev(1e-6, 0.625**2)
    exact = [mp.tanh(mp.sqrt(z)) / mp.sqrt(z) for z in map(mp.mpf, zs)]
    target = np.array([float((e - 1) / z) for e, z in zip(exact, map(mp.mpf, zs), strict=True)])
    weight = np.array([float(z / e) for e, z in zip(exact, map(mp.mpf, zs), strict=True)])
    return lawson(zs, target, weight, degree)


def fit_exp(degree=5):
    half = float(mp.log(2) / 2)
    rs = chebyshev(-half, half)
    exact = [mp.exp(r) for r in map(mp.mpf, rs)]
    pairs = list(zip(exact, map(mp.mpf, rs), strict=True))
    target = np.array([float((e - 1 - r) / r**2) for e, r in pairs])
    weight = np.array([float(r**2 / e) for e, r in pairs])
    return lawson(rs, target, weight, degree)


def main():
    for name, (coefficients, error) in {"tanh P": fit_tanh(), "exp Q": fit_exp()}.items():
        print(f"{name}: relative error {error:.1e}")
        for power, value in enumerate(coefficients):
            print(f"  x^{power}  {value: .12g}")
    high = mp.floor(mp.log(2) * 2**16) / 2**16
    print(f"ln 2 in two parts: {float(high).hex()}, {float(mp.log(2) - high).hex()}")


if __name__ == "__main__":
    main()
