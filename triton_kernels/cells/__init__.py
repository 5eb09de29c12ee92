"""The cells that the Triton kernels compute."""

from __future__ import annotations

from . import rnn

CELLS = {**rnn.CELLS}
