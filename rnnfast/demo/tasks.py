"""What is learned: scikit-learn's handwritten digits, one pixel per time step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

PIXELS = 64  # 8 x 8
TEST_DIGITS = 360  # of 1797


@dataclass(frozen=True)
class Task:
    """Name the digit after having seen all its pixels, one at a time, and then the noise."""

    name: str
    inputs: Tensor  # [N, T, 1], batch first
    labels: Tensor  # [N]
    epochs: int
    test_digits: int = TEST_DIGITS

    @property
    def steps(self) -> int:
        return self.inputs.shape[1]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.inputs[self.test_digits :], self.labels[self.test_digits :]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.inputs[: self.test_digits], self.labels[: self.test_digits]


def digit_tasks(seed: int, *, epochs: int | None = None, quick: bool = False) -> list[Task]:
    """The short task and the long one, in which the digit has to be kept in mind.

    Args:
        epochs: of every task, instead of its own number.
        quick: few digits, one epoch.
    """
    return [
        digits_then_noise("64 steps: the digit", 64, seed, epochs or 30, quick),
        digits_then_noise("250 steps: the digit, then noise", 250, seed, epochs or 10, quick),
    ]


def digits_then_noise(name: str, steps: int, seed: int, epochs: int, quick: bool) -> Task:
    """Pixels in reading order, scaled to mean 0 and deviation 1 as the normal noise has."""
    data = load_digits()
    pixels = torch.as_tensor(data.data, dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    labels = torch.as_tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    noise = torch.randn(len(labels), steps - PIXELS, generator=generator)
    inputs = torch.cat([pixels[order], noise], dim=1).unsqueeze(-1)
    if quick:
        return Task(name, inputs[:192], labels[order][:192], min(epochs, 2), test_digits=64)
    return Task(name, inputs, labels[order], epochs)
