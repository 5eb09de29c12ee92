"""Initial values of a module's weights. "torch" is nn.RNN's own: every parameter is uniform in
+-1/sqrt(H), drawn in the order of parameters()."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch_norm import restart


@torch.no_grad()
def torch_(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    bound = hidden_size**-0.5
    for x in parameters.values():
        nn.init.uniform_(x, -bound, bound)


def orthogonal(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """W_hh orthogonal (Saxe et al. 2014), W_ih Glorot, biases 0."""
    _draw(parameters, hh=nn.init.orthogonal_, ih=nn.init.xavier_uniform_)


def identity(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """W_hh = I, W_ih normal with standard deviation 0.001, biases 0: IRNN (Le et al. 2015)."""
    _draw(parameters, hh=nn.init.eye_, ih=lambda x: nn.init.normal_(x, std=0.001))


def glorot(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices uniform after Glorot and Bengio 2010, biases 0."""
    _draw(parameters, hh=nn.init.xavier_uniform_, ih=nn.init.xavier_uniform_)


def he(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices normal after He et al. 2015 with the gain of the nonlinearity, biases 0."""

    def normal(x: Tensor) -> None:
        nn.init.kaiming_normal_(x, nonlinearity=nonlinearity)

    _draw(parameters, hh=normal, ih=normal)


@torch.no_grad()
def _draw(parameters: dict[str, Tensor], hh, ih) -> None:
    """Applies ``hh`` to W_hh of each head, ``ih`` to W_ih, and sets the biases to 0."""
    for name, x in parameters.items():
        if name.startswith("weight_hh"):
            for block in x.split(x.shape[1]):
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


def reset(rnn: nn.RNNBase) -> None:
    """Draws the weights and biases of a module, and starts its norms again. Parameters of a
    subclass stay."""
    own, drawn = set(rnn._flat_weights_names), {}
    for path, x in rnn.named_parameters():
        name, below = _own_name(path, own)
        if name is not None:
            drawn[name + below] = x
    INITS[rnn.init](drawn, rnn.hidden_size, rnn.nonlinearity)
    start_norms(rnn)


def start_norms(rnn: nn.RNNBase) -> None:
    """Sets the weights of the norms to 1, their biases to 0, and their running statistics to what
    they are before the first batch."""
    weights = {name.replace("weight_ih", "norm_weight") for name, *_ in rnn._all_weights}
    biases = {name.replace("weight", "bias") for name in weights}
    for path, x in rnn.named_parameters():
        name, _ = _own_name(path, weights | biases)
        if name is not None:
            (nn.init.ones_ if name in weights else nn.init.zeros_)(x)
    restart(rnn._buffers, {name.removeprefix("norm_weight") for name in weights})


def _own_name(path: str, own: set[str]) -> tuple[str | None, str]:
    """The module's own name of the parameter at ``path``, or of the parameter that it is a part of,
    and the name of the part. (None, "") for a parameter of something else."""
    if path in own:
        return path, ""
    first, _, rest = path.partition(".")
    if first == "parametrizations":
        name, _, part = rest.partition(".")
        # torch.nn.utils.parametrize calls the parts original, original0, original1. Other
        # parameters there belong to the parametrization.
        return (name, "." + part) if name in own and part.startswith("original") else (None, "")
    # Pruning and the older weight_norm and spectral_norm append a word to the name.
    name, _, part = path.rpartition("_")
    return (name, "_" + part) if name in own and part in ("orig", "g", "v") else (None, "")
