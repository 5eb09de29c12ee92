"""Numbers with a bound of their error, on which the judge runs a cell's own formulas.

A kernel computes the same formula in float32 or float64, with one rounding after each operation.
The rules are those of running error analysis (Higham 2002, section 3.3): an operation passes the
errors of its operands on, to first order, and adds its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Units in the last place by which exp, tanh and what is made of them may miss; the kernels' stay
# below 2 (tests/cpp/activations_test.cpp).
FUNCTION = 4
OWN = torch.finfo(torch.float64).eps / 2


class Tracked:
    """A float64 tensor and a bound of its error.

    Args:
        u: the unit roundoff of the arithmetic.
    """

    def __init__(self, value: Tensor, error: Tensor | float, u: float) -> None:
        self.value, self.u = value, u
        self.error = error if isinstance(error, Tensor) else torch.full_like(value, error)

    def _rounded(self, value: Tensor, error: Tensor, times: float = 1) -> Tracked:
        # The judge's own float64 rounds, too, which counts where a kernel computes in float64.
        return Tracked(value, error + times * (self.u + OWN) * value.abs(), self.u)

    def _other(self, other: Tracked | Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return (other.value, other.error) if isinstance(other, Tracked) else (other, 0.0)

    # ---------------------------------------------------------------------------------- arithmetic

    def __add__(self, other: Tracked | float) -> Tracked:
        value, error = self._other(other)
        return self._rounded(self.value + value, self.error + error)

    __radd__ = __add__

    def __neg__(self) -> Tracked:
        return Tracked(-self.value, self.error, self.u)

    def __sub__(self, other: Tracked | float) -> Tracked:
        value, error = self._other(other)
        return self._rounded(self.value - value, self.error + error)

    def __rsub__(self, other: float) -> Tracked:
        return (-self) + other

    def __mul__(self, other: Tracked | float) -> Tracked:
        value, error = self._other(other)
        size = abs(value)
        passed = self.error * size + self.value.abs() * error
        return self._rounded(self.value * value, passed)

    __rmul__ = __mul__

    # ----------------------------------------------------------------------------------- functions

    def sigmoid(self) -> Tracked:
        s = self.value.sigmoid()
        # Beside its slope: where the slope is flat, a large error can still move the value.
        reach = torch.maximum(s * (-self.value).sigmoid(), self._reach(torch.sigmoid))
        return self._rounded(s, reach * self.error, FUNCTION)

    def tanh(self) -> Tracked:
        t = self.value.tanh()
        reach = torch.maximum(1 - t * t, self._reach(torch.tanh))
        return self._rounded(t, reach * self.error, FUNCTION)

    def _reach(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """The steepest chord of f between the value and the ends of its interval."""
        e = self.error.clamp(min=1e-300)
        here = f(self.value)
        up, down = f(self.value + e) - here, here - f(self.value - e)
        return torch.maximum(up, down) / e

    # ----------------------------------------------------------------------------- shapes and torch

    def __getitem__(self, index: Any) -> Tracked:
        return Tracked(self.value[index], self.error[index], self.u)

    def unbind(self) -> tuple[Tracked, ...]:
        return tuple(self[i] for i in range(len(self.value)))

    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        if f is torch.stack:
            parts = [
                part.plain() if isinstance(part, Tracked) else (part, None) for part in args[0]
            ]
            like = next(part for part in args[0] if isinstance(part, Tracked))
            value = torch.stack([v for v, _ in parts])
            error = torch.stack([torch.zeros_like(v) if e is None else e for v, e in parts])
            return Tracked(value, error, like.u)
        if f is torch.zeros_like:
            return Tracked(torch.zeros_like(args[0].value), 0.0, args[0].u)
        if f is torch.ones_like:
            return Tracked(torch.ones_like(args[0].value), 0.0, args[0].u)
        raise NotImplementedError(f"{f} of numbers with an error bound")

    def plain(self) -> tuple[Tensor, Tensor]:
        return self.value, self.error
