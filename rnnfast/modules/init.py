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

    def square(x: Tensor) -> None:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x.copy_(nn.init.orthogonal_(wide))  # torch has no QR decomposition in 16 bits

    _draw(parameters, hidden_size, hh=square, ih=nn.init.xavier_uniform_)


def identity(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """W_hh = I, W_ih normal with standard deviation 0.001, biases 0: IRNN (Le et al. 2015)."""
    _draw(parameters, hidden_size, hh=nn.init.eye_, ih=lambda x: nn.init.normal_(x, std=0.001))


def glorot(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices uniform after Glorot and Bengio 2010, biases 0."""
    _draw(parameters, hidden_size, hh=nn.init.xavier_uniform_, ih=nn.init.xavier_uniform_)


def he(parameters: dict[str, Tensor], hidden_size: int, nonlinearity: str) -> None:
    """Both matrices normal after He et al. 2015 with the gain of the nonlinearity, biases 0. The
    gain of softplus is that of ReLU, to which it comes close where its input is large."""
    known = "relu" if nonlinearity == "softplus" else nonlinearity

    def normal(x: Tensor) -> None:
        nn.init.kaiming_normal_(x, nonlinearity=known)

    _draw(parameters, hidden_size, hh=normal, ih=normal)


@torch.no_grad()
def _draw(parameters: dict[str, Tensor], hidden_size: int, hh, ih) -> None:
    """Applies ``hh`` to W_hh of each gate and head and to the projection of h, ``ih`` to W_ih of
    each gate, and sets the biases to 0."""
    projected = any(name.startswith("weight_hr") for name in parameters)
    for name, x in parameters.items():
        if name.startswith("weight_hh"):
            for block in x.split(hidden_size if projected else x.shape[1]):
                hh(block)
        elif name.startswith("weight_hr"):
            hh(x)
        elif name.startswith("weight_ih"):
            for block in x.split(hidden_size):
                ih(block)
        else:
            nn.init.zeros_(x)


INITS = {
    "torch": torch_,
    "orthogonal": orthogonal,
    "identity": identity,
    "glorot": glorot,
    "he": he,
}
GATED = ("torch", "orthogonal", "glorot")  # the inits of an LSTM and a GRU


def reset(rnn: nn.RNNBase) -> None:
    """Draws the weights and biases of a module, and starts its norms again. Parameters of a
    subclass stay."""
    own, drawn = set(rnn._flat_weights_names), {}
    for path, x in rnn.named_parameters():
        name, below = _own_name(path, own)
        if name is not None:
            drawn[name + below] = x
    INITS[rnn.init](drawn, rnn.hidden_size, getattr(rnn, "nonlinearity", "tanh"))
    rnn._start_gates(drawn)
    start_norms(rnn)


@torch.no_grad()
def set_gate_bias(
    parameters: dict[str, Tensor], gate: int, hidden_size: int, value: Tensor | float
) -> None:
    """Sets the bias of a gate: ``value`` in b_hh, 0 in b_ih, of all layers and directions."""
    rows = slice(gate * hidden_size, (gate + 1) * hidden_size)
    for name, x in parameters.items():
        if name.startswith("bias_hh"):
            x[rows] = value
        elif name.startswith("bias_ih"):
            x[rows] = 0


@torch.no_grad()
def set_chrono(
    parameters: dict[str, Tensor], hidden_size: int, steps: int, gate: int, against: int | None
) -> None:
    """Chrono initialization (Tallec & Ollivier 2018): b_gate = log u, u uniform in [1, steps - 1],
    for memories of up to ``steps`` time steps; b_against = -b_gate."""
    for name, x in parameters.items():
        if not name.startswith("bias_hh"):
            continue
        pair = {name: x, name.replace("_hh", "_ih"): parameters[name.replace("_hh", "_ih")]}
        bias = torch.empty_like(x[:hidden_size]).uniform_(1, steps - 1).log_()
        set_gate_bias(pair, gate, hidden_size, bias)
        if against is not None:
            set_gate_bias(pair, against, hidden_size, -bias)


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
