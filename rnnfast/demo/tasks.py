"""The task: scikit-learn's handwritten digits, a row of pixels per time step, then noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

ROWS = COLUMNS = 8
TEST_DIGITS = 360  # of 1797
LOUDNESS = 0.1  # deviation of the noise; that of the pixels is 1
DELAYS = 100, 250, 500


@dataclass(frozen=True)
class Task:
    """Name the digit that was seen first, after so many steps of noise."""

    delay: int  # steps of noise
    inputs: Tensor  # [N, T, 8], batch first
    labels: Tensor  # [N]
    epochs: int
    test_digits: int = TEST_DIGITS

    @property
    def name(self) -> str:
        return f"remember across {self.delay} steps"

    @property
    def steps(self) -> int:
        return self.inputs.shape[1]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.inputs[self.test_digits :], self.labels[self.test_digits :]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.inputs[: self.test_digits], self.labels[: self.test_digits]


def digit_tasks(seed: int, *, epochs: int, quick: bool = False) -> list[Task]:
    """The same task over longer and longer delays; with ``quick`` few digits and short delays."""
    delays = (10, 20, 30) if quick else DELAYS
    return [digits_then_noise(delay, seed, epochs, quick) for delay in delays]


def digits_then_noise(delay: int, seed: int, epochs: int, quick: bool = False) -> Task:
    """Pixels are scaled to mean 0 and deviation 1."""
    data = load_digits()
    pixels = torch.as_tensor(data.data, dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    labels = torch.as_tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    noise = LOUDNESS * torch.randn(len(labels), delay, COLUMNS, generator=generator)
    inputs = torch.cat([pixels[order].view(-1, ROWS, COLUMNS), noise], dim=1)
    if quick:
        return Task(delay, inputs[:192], labels[order][:192], epochs, test_digits=64)
    return Task(delay, inputs, labels[order], epochs)
