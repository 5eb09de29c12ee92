"""Which dtype a recurrence runs in, under autocast and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..tracing import constant


@constant
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # "meta" knows none


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device type; None where it is off."""
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` as autocast's lower-precision operations take them: float64 stays."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where ``dtype`` is stored."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def widened(x: Tensor | None) -> Tensor | None:
    """A norm's parameters as it reads them."""
    return None if x is None else x.to(arithmetic(x.dtype))


def no_autocast(device: str) -> AbstractContextManager:
    """Operations inside take the dtypes they are given, on any device type."""
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def rounds_to_tf32() -> bool:
    """Whether torch lets float32 recurrences round their operands to TF32 on a GPU."""
    switch = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(switch, "fp32_precision"):
        return switch.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """How float32 products round on a GPU while it lasts: those of matrices and cuDNN's alike.

    Both of cuDNN's switches, since torch refuses to tell its older one where they differ.
    """
    backends = torch.backends
    switches = backends.cuda.matmul, backends.cudnn.rnn, backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value
