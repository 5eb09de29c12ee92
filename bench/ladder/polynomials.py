"""The coefficients in csrc/cpu/math.h and bench/ladder/activations.cpp: minimax fits by Remez.

    pip install mpmath && python bench/ladder/polynomials.py

Each fit minimises the relative error of the whole function, which an ulp measures. For
exp(t) - 1 = t + t^2 Q(t) it is the error of exp(t) - 1, which is stricter than that of exp.
"""

from collections.abc import Callable

import mpmath as mp

mp.mp.dps = 40
GRID = 800
ROUNDS = 20
TINY = mp.mpf("1e-9")  # below it the quotients cancel, and the first terms of the series are enough
MARGIN = mp.mpf("1.0001")  # the argument reduction rounds, too

LN2 = mp.log(2)

Function = Callable[[mp.mpf], mp.mpf]


def remez(target: Function, weight: Function, low, high, terms: int) -> tuple[list, mp.mpf]:
    """Coefficients, lowest first, that minimise max |weight (target - poly)|, and that maximum."""
    nodes = [mp.cos(mp.pi * i / GRID) for i in range(GRID + 1)]
    xs = [(low + high) / 2 - (high - low) / 2 * node for node in nodes]
    targets, weights = [target(x) for x in xs], [weight(x) for x in xs]
    extrema = [round(GRID * i / terms) for i in range(terms + 1)]
    for _ in range(ROUNDS):
        rows = [
            [*(xs[i] ** k for k in range(terms)), (-1) ** sign / weights[i]]
            for sign, i in enumerate(extrema)
        ]
        *poly, _ = mp.lu_solve(mp.matrix(rows), mp.matrix([targets[i] for i in extrema]))
        errors = [
            w * (y - mp.polyval(poly[::-1], x))
            for x, y, w in zip(xs, targets, weights, strict=True)
        ]
        before, extrema = extrema, []
        for i, error in enumerate(errors):  # the largest of each stretch of one sign
            if not extrema or (error > 0) != (errors[extrema[-1]] > 0):
                extrema.append(i)
            elif abs(error) > abs(errors[extrema[-1]]):
                extrema[-1] = i
        if extrema == before:
            break
        if len(extrema) != terms + 1:
            raise ArithmeticError(f"{len(extrema)} extrema instead of {terms + 1}")
    return poly, max(map(abs, errors))


def fit_exp_tail(terms: int):
    """Q of exp(t) - 1 = t + t^2 Q(t), |t| <= ln(2)/2."""
    limit = LN2 / 2 * MARGIN

    def target(t):
        return (mp.expm1(t) - t) / t**2 if abs(t) > TINY else mp.mpf(1) / 2 + t / 6

    def weight(t):
        return abs(t**2 / mp.expm1(t)) + TINY**2 if t else TINY**2

    return remez(target, weight, -limit, limit, terms)


def fit_in_square(function: Function, first, terms: int, limit=LN2 / 4):
    """P of function(x) = 1 + z P(z), z = x^2, |x| <= limit; P(0) = first."""
    limit = limit**2 * MARGIN

    def target(z):
        return (function(mp.sqrt(z)) - 1) / z if z > TINY else first

    def weight(z):
        return z / function(mp.sqrt(z)) + TINY**2 if z else TINY**2

    return remez(target, weight, mp.mpf(0), limit, terms)


def tanh_over_x(x):
    return mp.tanh(x) / x


def atanh_over_x(x):
    """log(1 + f) = 2 atanh(x) with x = f / (2 + f), at most 1/3 for f in [0, 1]."""
    return mp.atanh(x) / x


def main():
    third, seam = mp.mpf(1) / 3, mp.mpf("0.5625")
    fits = {
        "exp tail, float": fit_exp_tail(5),
        "exp tail, double": fit_exp_tail(11),
        "tanh near 0, float": fit_in_square(tanh_over_x, -third, 5, seam),
        "tanh near 0, double": fit_in_square(tanh_over_x, -third, 11, seam),
        "atanh to 1/3, float": fit_in_square(atanh_over_x, third, 4, third),
        "atanh to 1/3, double": fit_in_square(atanh_over_x, third, 10, third),
        "x coth(x), float (ladder)": fit_in_square(lambda x: x * mp.coth(x), third, 2),
        "tanh(x)/x, float (ladder)": fit_in_square(tanh_over_x, -third, 3),
    }
    for name, (coefficients, error) in fits.items():
        print(f"{name}: relative error {mp.nstr(error, 2)}")
        for power, value in enumerate(coefficients):
            print(f"  x^{power}  {mp.nstr(value, 20)}")
    for bits in (16, 42):
        high = mp.floor(LN2 * 2**bits) / 2**bits
        print(f"ln 2 in two parts: {float(high).hex()}, {float(LN2 - high).hex()}")


if __name__ == "__main__":
    main()
