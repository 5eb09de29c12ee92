"""The networks that the tests of GradientMonitor train."""

from __future__ import annotations

import torch
from flows import IN, H, inputs
from torch import Tensor, nn

import rnnfast


class Two(nn.Module):
    """An encoder of two layers and directions, and a decoder."""

    def __init__(self, **options) -> None:
        super().__init__()
        options = {"track_gradient_flow": True, "dtype": torch.float64} | options
        self.encoder = rnnfast.RNN(IN, H, 2, bidirectional=True, **options)
        self.decoder = rnnfast.RNN(2 * H, 5, **options)

    def forward(self, x: Tensor, **more) -> Tensor:
        return self.decoder(self.encoder(x, **more)[0], **more)[0]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(seed=step)).square().sum().backward()
        optimizer.step()


def loss_of(rnn: rnnfast.RNN, x: Tensor, **more) -> Tensor:
    y, h_n = rnn(x, **more)
    return y.square().sum() + h_n.sum()
