"""The drop-in modules: :class:`rnnfast.RNN`, :class:`rnnfast.LSTM` and :class:`rnnfast.GRU`."""

from .gru import GRU
from .lstm import LSTM
from .rnn import RNN

__all__ = ["GRU", "LSTM", "RNN"]
