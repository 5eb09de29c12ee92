"""Estimated times of torch's own kernels (cuDNN). Each backend compares its own with them."""

from __future__ import annotations

import torch

from ..recurrence.precision import rounds_to_tf32


def torch_step(dtype: torch.dtype, units: int, groups: int, rows: int, cores: int) -> float:
    """Microseconds of a time step of forward.

    Args:
        units, groups, rows: units of a head; directions times heads; rows of the batch.
        cores: multiprocessors of the GPU.
    """
    exact = dtype == torch.float32 and not rounds_to_tf32()
    rate = 50e6 if exact else 250e6 if dtype == torch.float32 else 500e6  # FLOP a microsecond
    work = 2 * rows * units**2 * groups / rate * 132 / cores
    return (1.0 if units <= 256 and not exact else 1.5) + work
