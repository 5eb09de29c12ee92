"""The arguments that rnnfast adds to those of nn.RNNBase, and the values that an argument may have:
at construction, and when it is set on a module that exists."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..argument_types import Backend, Init, Norm, TrackGradientFlow
from ..backends import BACKENDS
from ..functional import check_clip_state_grad, check_count, check_options, check_positive
from .init import GATED, INITS


class Settings(NamedTuple):
    """Arguments that every module adds to those of nn.RNNBase. A module with the default values
    computes what torch's does."""

    norm: Norm | None = None
    norm_eps: float = 1e-5
    init: Init = "torch"
    residual: bool = False
    num_heads: int = 1
    track_gradient_flow: TrackGradientFlow = False
    clip_state_grad: float | None = None
    bptt_window: int | None = None
    backend: Backend = "auto"


DEFAULTS = Settings()._asdict()
CHOICES = {
    "norm": (None, "layer", "batch"),
    "init": INITS,
    "track_gradient_flow": (False, True, "sample"),
    "backend": BACKENDS,  # and "auto"; a backend may be added later
}


def check_settings(settings: Settings) -> None:
    """The checks that come before those of nn.RNNBase.

    Raises:
        ValueError, TypeError: a setting has a value that no module takes.
    """
    for name in CHOICES:
        check_choice(name, getattr(settings, name))
    check_bool("residual", settings.residual)


def check_choice(name: str, value: object) -> None:
    """
    Raises:
        ValueError: the argument has no such value.
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


def check_gates(bias: bool, init: str, chrono_steps: int | None) -> None:
    """
    Raises:
        TypeError, ValueError: a module with gates cannot have these arguments.
    """
    if init not in GATED:
        raise ValueError(f"init: given {init!r}, wanted one of {list(GATED)} for a cell with gates")
    if chrono_steps is not None:
        check_count("chrono_steps", chrono_steps)
        if chrono_steps < 3:
            raise ValueError(f"chrono_steps: given {chrono_steps}, wanted 3 or more")
        if not bias:
            raise ValueError("chrono_steps: given with bias=False, wanted the bias that carries it")


def check_recurrence(rnn: nn.RNNBase, hidden_size: int) -> None:
    """
    Raises:
        TypeError, ValueError: the module's arguments do not fit ``hidden_size``.
    """
    options = rnn.norm == "layer", rnn.norm_eps, rnn.bptt_window, rnn.clip_state_grad
    check_options(hidden_size, rnn.num_heads, *options)


def warn_of_idle_residual(rnn: nn.RNNBase, stacklevel: int) -> None:
    """Warns where residual=True adds nothing."""
    width = 2 * rnn.hidden_size if rnn.bidirectional else rnn.hidden_size
    if rnn.num_layers <= (1 if rnn.input_size == width else 2):
        warnings.warn(
            f"residual=True adds nothing with num_layers={rnn.num_layers} and "
            f"input_size={rnn.input_size}: no layer before the last has an input as wide as its "
            f"output, {width}",
            stacklevel=stacklevel + 1,
        )


# ------------------------------------------------------------ when an argument is set on a module

Check = Callable[[nn.RNNBase, str, object], None]


def _choice(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_choice(name, value)


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


def _gated_init(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_choice(name, value)
    check_gates(rnn.bias, value, None)


def _norm_eps(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_positive(name, value)


def _bptt_window(rnn: nn.RNNBase, name: str, value: object) -> None:
    if value is not None:
        check_count(name, value)


def _clip_state_grad(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_clip_state_grad(value)


def _fixed(rnn: nn.RNNBase, name: str, value: object) -> None:
    """Refuses any other value: it would need other parameters."""
    made_for = getattr(rnn, name)
    if type(value) is not type(made_for) or value != made_for:
        raise ValueError(
            f"{name}: given {value!r}, wanted {made_for!r}, which the parameters were made for; "
            f"make another RNN with {name}={value!r}"
        )


def _size(rnn: nn.RNNBase, name: str, value: object) -> None:
    """Compares a size with the weights: code that exchanges weights sets the sizes afterwards."""
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


def _hidden_size(rnn: nn.RNNBase, name: str, value: object) -> None:
    _size(rnn, name, value)
    check_recurrence(rnn, value)


# For each argument the check of a new value.
CHECKS: dict[str, Check] = {
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
    "hidden_size": _hidden_size,
    "num_layers": _fixed,
    "bias": _fixed,
    "bidirectional": _fixed,
    "proj_size": _fixed,
    "num_heads": _fixed,
    "norm": _fixed,
}

# Of a module with gates.
GATED_CHECKS: dict[str, Check] = {
    **CHECKS,
    "init": _gated_init,
    "mode": _fixed,
    "chrono_steps": _fixed,
    "forget_bias": _fixed,
    "return_cell_states": _bool,
}
