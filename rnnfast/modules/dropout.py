"""Dropout between layers, with the mask that nn.RNN draws under the same seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing


def dropped(y: Tensor, p: float, packing: Packing | None) -> Tensor:
    """y [T, B, features] after dropout. nn.RNN draws a mask [T, B, features], or [points, features]
    for packed input."""
    if packing is None:
        return F.dropout(y, p)
    mask = F.dropout(y.new_ones(packing.points, y.shape[2]), p)
    mask, _ = torch._VF._pad_packed_sequence(mask, packing.batch_sizes, False, 0.0, y.shape[0])
    return y * (mask if packing.rows is None else mask[:, packing.rows])
