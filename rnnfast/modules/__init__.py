"""The drop-in modules. See :class:`rnnfast.RNN`."""

from .rnn import RNN

__all__ = ["RNN"]
