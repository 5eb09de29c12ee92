"""Recurrent networks that are fast to train: :class:`RNN`, :class:`LSTM` and :class:`GRU`."""

from pathlib import Path as _Path

# In a checkout the Triton kernels are beside the package; an installed package contains them.
if (_Path(__file__).parents[1] / "triton_kernels" / "plan.py").exists():
    __path__.append(str(_Path(__file__).parents[1]))

from . import functional
from ._version import __version__ as __version__
from .backends import BackendError
from .convert import replace, to_torch
from .deploy import decompositions
from .diagnose.monitor import GradientMonitor
from .diagnose.probe import GradientProbe, probe
from .gradient_flow import GradientFlow
from .modules import GRU, LSTM, RNN
from .report import explain, info
from .report import warn_of_missing_kernels as _warn_of_missing_kernels

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendError",
    "GradientFlow",
    "GradientMonitor",
    "GradientProbe",
    "decompositions",
    "explain",
    "functional",
    "info",
    "probe",
    "replace",
    "to_torch",
]

_warn_of_missing_kernels()
