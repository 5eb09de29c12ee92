"""Which tensors have values that can be looked at: not those of shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiler import makes_program


def has_values(x: Tensor) -> bool:
    """False on "meta", in FakeTensorMode, and where a tracer has its own kind of tensor."""
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and x.device.type != "meta"


def values_of(x: Tensor) -> Tensor | None:
    """x as it lies in the memory of the CPU, in all samples that torch.func.vmap maps over; None
    where a look at it would synchronize with a GPU, break a graph or become part of a program, or
    nothing is there."""
    if torch.compiler.is_compiling() or makes_program() or x.device.type != "cpu":
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x if has_values(x) else None
