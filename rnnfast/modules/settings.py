"""The values that the arguments of rnnfast.RNN may have: at construction, and when one is set on a
module that exists."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from ..backends import BACKENDS, check_nonlinearity
from ..functional import check_clip_state_grad, check_count, check_options, check_positive
from .init import INITS

CHOICES = {
    "norm": (None, "layer", "batch"),
    "init": INITS,
    "track_gradient_flow": (False, True, "sample"),
    "backend": BACKENDS,  # and "auto"; a backend may be added later
}
MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}  # of a nonlinearity


def check_choice(name: str, value: object) -> None:
    """
    Raises:
        ValueError: it is none of the argument's.
    """
    known = [*(("auto",) if name == "backend" else ()), *CHOICES[name]]
    if value not in known or (isinstance(value, int) and not isinstance(value, bool)):
        raise ValueError(f"{name}: given {value!r}, wanted one of {known}")


def check_bool(name: str, value: object) -> None:
    """
    Raises:
        TypeError: it is no bool, in the words of nn.RNN.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def warn_of_idle_residual(rnn: nn.RNNBase, stacklevel: int) -> None:
    """Where residual=True adds nothing."""
    width = 2 * rnn.hidden_size if rnn.bidirectional else rnn.hidden_size
    if rnn.num_layers <= (1 if rnn.input_size == width else 2):
        warnings.warn(
            f"residual=True adds nothing with num_layers={rnn.num_layers} and "
            f"input_size={rnn.input_size}: no layer before the last has an input as wide as its "
            f"output, {width}",
            stacklevel=stacklevel + 1,
        )


def _choice(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_choice(name, value)


def _nonlinearity(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_nonlinearity(value)


def _mode(rnn: nn.RNNBase, name: str, value: object) -> None:
    known = list(MODES.values())
    if value not in known:
        raise ValueError(f"mode: given {value!r}, wanted one of {known}")


def _bool(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_bool(name, value)


def _residual(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_bool(name, value)
    if value:
        warn_of_idle_residual(rnn, stacklevel=3)


def _dropout(rnn: nn.RNNBase, name: str, value: object) -> None:
    number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"dropout: given {value!r}, wanted a number in range [0, 1]")


def _norm_eps(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_positive(name, value)


def _bptt_window(rnn: nn.RNNBase, name: str, value: object) -> None:
    if value is not None:
        check_count(name, value)


def _clip_state_grad(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_clip_state_grad(value)


def _fixed(rnn: nn.RNNBase, name: str, value: object) -> None:
    """Another value would need other parameters."""
    made_for = getattr(rnn, name)
    if type(value) is not type(made_for) or value != made_for:
        raise ValueError(
            f"{name}: given {value!r}, wanted {made_for!r}, which the parameters were made for; "
            f"make another RNN with {name}={value!r}"
        )


def _size(rnn: nn.RNNBase, name: str, value: object) -> None:
    """The weights say it: whoever exchanges them sets their sizes afterwards."""
    weight, axis = getattr(rnn, "weight_ih_l0", None), 0 if name == "hidden_size" else 1
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        _fixed(rnn, name, value)
        return
    wanted = weight.shape[axis]
    if type(value) is not int or value != wanted:
        raise ValueError(
            f"{name}: given {value!r}, wanted {wanted} as weight_ih_l0 has it; exchange the "
            "weights first, or make another RNN"
        )
    if name == "hidden_size":
        others = rnn.num_heads, rnn.norm == "layer", rnn.norm_eps
        check_options(value, *others, rnn.bptt_window, rnn.clip_state_grad)


# The check of an argument's new value, by its name.
CHECKS: dict[str, Callable[[nn.RNNBase, str, object], None]] = {
    "nonlinearity": _nonlinearity,
    "mode": _mode,
    "batch_first": _bool,
    "residual": _residual,
    "dropout": _dropout,
    "init": _choice,
    "track_gradient_flow": _choice,
    "backend": _choice,
    "norm_eps": _norm_eps,
    "bptt_window": _bptt_window,
    "clip_state_grad": _clip_state_grad,
    "input_size": _size,
    "hidden_size": _size,
    "num_layers": _fixed,
    "bias": _fixed,
    "bidirectional": _fixed,
    "proj_size": _fixed,
    "num_heads": _fixed,
    "norm": _fixed,
}
