"""The cells: what each computes in one step, written so that a reader can check it in a minute."""

from . import rnn

__all__ = ["rnn"]
