"""Plain recurrent networks that are fast to train. See :class:`rnnfast.RNN`."""

from . import functional
from .backends import BackendError
from .convert import replace, to_torch
from .gradient_flow.monitor import GradientMonitor
from .modules import RNN
from .report import explain, info

__version__ = "0.1.0"

__all__ = [
    "RNN",
    "BackendError",
    "GradientMonitor",
    "explain",
    "functional",
    "info",
    "replace",
    "to_torch",
]
