"""Whether a tensor has values that can be read; some have a shape alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import makes_program


def has_values(x: Tensor) -> bool:
    """False on "meta", in FakeTensorMode, and for a tracer's own kind of tensor."""
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and x.device.type != "meta"


def values_of(x: Tensor) -> Tensor | None:
    """x in the memory of the CPU, with all samples that torch.func.vmap maps over. None where x has
    no values, or where reading them would synchronize with a GPU, break a graph or become part of a
    program."""
    if torch.compiler.is_compiling() or makes_program() or x.device.type != "cpu":
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x if has_values(x) else None
