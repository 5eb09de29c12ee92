"""Which dtype a recurrence runs in, under autocast and without."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device type; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` as autocast's lower-precision operations take them: float64 stays."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
