"""Which rows have a step, and what crosses the edge between two steps: lengths, reset, window.

Edge e lies between real steps e - 1 and e of a row. State and gradient do not cross it where
``reset[e]`` holds; the gradient alone does not cross it at multiples of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Rows


class Edges:
    """Masks [B, 1] over the rows of the batch; None, True or False where all rows agree."""

    def __init__(self, T: int, rows: Rows, window: int | None) -> None:
        self.T, self.lengths, self.reset, self.every = T, rows.lengths, rows.reset, window

    def valid(self, t: int) -> Tensor | None:
        """Rows with a step t; None for all."""
        return None if self.lengths is None else (t < self.lengths).unsqueeze(1)

    def enters(self, t: int, d: int) -> Tensor | bool:
        """Rows whose last step, in the order of direction d, is t."""
        if d or self.lengths is None:
            inside = self.valid(t)
            last = t == (0 if d else self.T - 1)
            return inside if last and inside is not None else last
        return (t == self.lengths - 1).unsqueeze(1)

    def begins(self, t: int, d: int) -> Tensor | bool:
        """Rows whose first step, in the order of direction d, is t and has no step before it."""
        if d and self.lengths is not None:
            return (t + 1 == self.lengths).unsqueeze(1)
        return t == (self.T - 1 if d else 0)

    def carried(self, t: int, d: int) -> Tensor | bool:
        """Rows whose step t gets a gradient from the step after it, in the order of direction d."""
        edge = t if d else t + 1
        stops = self.enters(t, d), self.cut(edge), self.window(edge) is not False
        if any(rows is True for rows in stops):
            return False
        masks = [rows for rows in stops if rows is not False]
        return ~(masks[0] | masks[-1]) if masks else True

    def cut(self, e: int) -> Tensor | bool:
        """Rows with a reset at edge e."""
        if self.reset is None or e == self.T:
            return False
        cut = self.reset[e].unsqueeze(1)
        return cut if self.lengths is None else cut & self.valid(e)

    def window(self, e: int) -> Tensor | bool:
        """Rows with an edge of the window at e."""
        if self.every is None or e in (0, self.T) or e % self.every:
            return False
        return True if self.lengths is None else self.valid(e)


def times(T: int, direction: int) -> range:
    """The steps in the order in which a direction takes them."""
    return range(T - 1, -1, -1) if direction else range(T)


def where(mask: Tensor | bool | None, a, b) -> Tensor | int:
    """torch.where; None and True take ``a`` whole, False takes ``b``."""
    if mask is None or mask is True:
        return a
    return b if mask is False else torch.where(mask, a, b)
