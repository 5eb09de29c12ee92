"""The record of the gradient on its way back through time, and what it says.

sums reads the buffers that backward filled; flow is the record (:class:`GradientFlow`); reading
makes half-life, horizon and verdict of its numbers; text and picture show them. Nothing here knows
a module: :mod:`rnnfast.diagnose` runs them.
"""

from .flow import GradientFlow, read

__all__ = ["GradientFlow", "read"]
