"""Initial values of a layer's weights. "torch" is nn.RNN's own: every parameter uniform in
+-1/sqrt(H), drawn in the order of parameters()."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def torch_(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    bound = hidden_size**-0.5
    for x in parameters.values():
        nn.init.uniform_(x, -bound, bound)


def orthogonal(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """W_hh orthogonal (Saxe et al. 2014), W_ih Glorot, biases 0."""
    _each(parameters, hh=nn.init.orthogonal_, ih=nn.init.xavier_uniform_)


def identity(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """W_hh = I, W_ih normal with standard deviation 0.001, biases 0: IRNN (Le et al. 2015)."""
    _each(parameters, hh=nn.init.eye_, ih=lambda x: nn.init.normal_(x, std=0.001))


def glorot(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices uniform after Glorot and Bengio 2010, biases 0."""
    _each(parameters, hh=nn.init.xavier_uniform_, ih=nn.init.xavier_uniform_)


def he(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices normal after He et al. 2015 with the gain of the nonlinearity, biases 0."""

    def draw(x: Tensor) -> None:
        nn.init.kaiming_normal_(x, nonlinearity=nonlinearity)

    _each(parameters, hh=draw, ih=draw)


@torch.no_grad()
def _each(parameters: dict[str, Tensor], hh, ih) -> None:
    for name, x in parameters.items():
        if name.startswith("weight_hh"):
            for block in x.split(x.shape[1]):  # of each head
                hh(block)
        elif name.startswith("weight_ih"):
            ih(x)
        else:
            nn.init.zeros_(x)


INITS = {
    "torch": torch_,
    "orthogonal": orthogonal,
    "identity": identity,
    "glorot": glorot,
    "he": he,
}
