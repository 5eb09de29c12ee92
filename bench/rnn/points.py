"""What is measured, and what has to come out. Pure data: nothing runs here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

FORWARD, BOTH = "forward", "forward+backward"

# design.md, section 8: by how much forward+backward on 2 threads has to beat torch.nn.RNN. Anything
# else is never slower; 0.97 leaves room for what two runs of the same code differ by.
NEVER_SLOWER = 0.97
LISTED = {
    (128, 1, 64): 35.0,
    (128, 16, 64): 5.0,
    (512, 32, 128): 3.0,
    (256, 32, 256): 1.8,
    (128, 64, 512): 1.2,
    (64, 64, 1024): 1.15,
    (784, 1, 17): NEVER_SLOWER,
    (300, 7, 100): NEVER_SLOWER,
    (50, 256, 64): NEVER_SLOWER,
    (20, 3, 2048): NEVER_SLOWER,
    (1000, 128, 32): NEVER_SLOWER,
    (5, 4, 8): NEVER_SLOWER,
    (1, 1, 1): 1 / 1.5,  # the price of a call, and nothing else
}
OVER_JAX = 1.0  # never slower than jax.lax.scan either,
AIM_OVER_JAX = 1.2  # and this is the aim
GEMM_SHARE = 0.85  # of the rate of a large GEMM, from these sizes on:
GEMM_SHARE_H, GEMM_SHARE_B = 256, 32
SCALING_POINT, SCALING = (128, 64, 512), 1.7  # one thread against two

SWEEP_H, SWEEP_B = (16, 32, 64, 128, 256, 512, 1024), (1, 8, 64)  # of the picture


class Point(NamedTuple):
    """A layer with I = H; ``kind`` says on whose account it is measured."""

    T: int
    B: int
    H: int
    kind: str

    def __str__(self) -> str:
        return f"({self.T}, {self.B}, {self.H})"

    @property
    def target(self) -> float:
        """What ``time of nn.RNN / time of rnnfast`` has to be."""
        return LISTED.get(self[:3], NEVER_SLOWER)

    def flops(self, what: str) -> int:
        """Projection and recurrence; each has two more products in the backward pass."""
        products = {FORWARD: 2, BOTH: 6}[what]
        return products * 2 * self.T * self.B * self.H * self.H


def listed() -> list[Point]:
    return [Point(*shape, "listed") for shape in LISTED]


def drawn(count: int, seed: int = 0) -> list[Point]:
    """Log-uniform sizes, the same ones in every run; none on which nn.RNN is busy for long."""
    generator = random.Random(seed)
    points: list[Point] = []
    while len(points) < count:
        T, B, H = (round(math.exp(generator.uniform(0, math.log(n)))) for n in (1000, 256, 1024))
        if (
            T * (1 + B * H * H / 4e5) <= 2000
        ):  # small steps cost a call each, large ones by the FLOP
            points.append(Point(T, B, H, "drawn"))
    return points


def sweep(Hs: Sequence[int] = SWEEP_H, Bs: Sequence[int] = SWEEP_B) -> list[Point]:
    """For the picture: T = 100, or what keeps a large layer short."""
    return [Point(min(100, max(10, 2_000_000 // (B * H))), B, H, "sweep") for B in Bs for H in Hs]


def quick() -> list[Point]:
    return [Point(1, 1, 1, "listed"), Point(5, 4, 8, "listed"), *sweep((16, 64), (1,))]


def everything() -> list[Point]:
    return [*listed(), *drawn(20), *sweep()]
