"""Dropout between layers, with the mask that nn.RNN draws under the same seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Where the points of a PackedSequence are in a padded batch. Dropout draws for them alone."""

    batch_sizes: Tensor
    points: int  # the sum of batch_sizes
    rows: Tensor | None = None  # the place of each row in the sorted batch; None: it is sorted


def dropped(y: Tensor, p: float, packing: Packing | None) -> Tensor:
    """y [T, B, features] after dropout. nn.RNN draws a mask [T, B, features], or [points, features]
    for packed input."""
    if packing is None:
        return F.dropout(y, p)
    mask = F.dropout(y.new_ones(packing.points, y.shape[2]), p)
    mask, _ = torch._VF._pad_packed_sequence(mask, packing.batch_sizes, False, 0.0, y.shape[0])
    return y * (mask if packing.rows is None else mask[:, packing.rows])
