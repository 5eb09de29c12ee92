"""The layout of what backward measures: sums over the entries of a step, from which the norms come.

One buffer per layer, int64 so that no cast of a module touches it, read as float64: a header, then
[D, T, N, fields], N being the batch or, summed over it, 1. The header says which backward pass
wrote it, T, N and D, whether da was stored in float16, whose range ends early, and a number that no
other buffer has. A buffer keeps its address while it is large enough, as CUDA graphs need.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..values import has_values

FIELDS = (
    "state_squares",  # of the gradient of all states (dh_t, dc_t) before clipping
    "carry_squares",  # of what came back from the step after
    "clipped_squares",  # of state_squares' gradient after clipping
    "preact_squares",  # of da_t
    "state_max",  # largest magnitude of state_squares' gradient
    "slopes",  # sum of the cell's gain: |f'(n_t)|, or the mean gate
    "nonfinite_grad",  # units whose gradient of a state or of a is not finite
    "nonfinite_state",  # how many of h_t
    "entries",  # how many there are
    "carried",  # how many of them the step after has sent a gradient back to
    "cell_squares",  # of the whole dL/dc_t, through h_t, too; 0 for a cell without c
    "cell_carry_squares",  # of its part that came back from the step after
)
HEADER = 6
NEVER = -2  # the number of a backward pass; -1 stands for one outside of autograd

_numbers = itertools.count()


def numbers(D: int, T: int, N: int) -> int:
    """The size of a buffer that has room for so much."""
    return HEADER + D * T * N * len(FIELDS)


def make(size: int, device: torch.device) -> Tensor:
    """A buffer that no backward pass has written. It differs from all others, because torch.jit
    takes constants that are equal for one."""
    buffer = torch.full((size,), NEVER, dtype=torch.int64, device=device)
    buffer[HEADER - 1].fill_(next(_numbers))
    return buffer


def begin(buffer: Tensor, D: int, T: int, N: int, dtype: torch.dtype) -> Tensor:
    """Where the running backward pass, which stores da in dtype, puts its [D, T, N, fields].

    Raises:
        RuntimeError: the buffer is none of :func:`make`; or there is not room enough, in a program
            that was made for other sizes.
    """
    size = numbers(D, T, N)
    if buffer.dtype != torch.int64 or buffer.dim() != 1:
        raise RuntimeError(
            f"record: given {buffer.dtype} of shape {tuple(buffer.shape)}, "
            f"wanted torch.int64 of shape [{size}] or more"
        )
    if buffer.numel() < size:
        room = (buffer.numel() - HEADER) // (len(FIELDS) * D)
        raise RuntimeError(
            f"track_gradient_flow: given {T * N} points, and this program, of torch.export or "
            f"torch.jit.trace, has room to record {room}; before you make it, call the module "
            "once on an input of the largest size"
        )
    header = [torch._C._current_graph_task_id(), T, N, D, dtype == torch.float16]
    if buffer.device.type == "cpu":
        buffer[: len(header)] = torch.tensor(header)
    else:  # a copy from the host would synchronize, and cannot be in a CUDA graph
        for i, value in enumerate(header):
            buffer[i].fill_(value)
    return buffer[HEADER:size].view(torch.float64).view(D, T, N, len(FIELDS))


def read(buffer: Tensor) -> tuple[int, bool, Tensor]:
    """Which backward pass wrote it (NEVER: none), whether in float16, and its
    [D, T, N, fields], which the next one writes over."""
    task, T, N, D, half = _header(buffer)
    if task == NEVER:
        return task, False, torch.empty(0, 0, 0, len(FIELDS), dtype=torch.float64)
    found = buffer[HEADER : numbers(D, T, N)].view(torch.float64).view(D, T, N, len(FIELDS))
    return task, bool(half), found


def _header(buffer: Tensor) -> list[int]:
    """That of a record without values (on "meta", in FakeTensorMode): no backward pass wrote it."""
    return buffer[: HEADER - 1].tolist() if has_values(buffer) else [NEVER, 0, 0, 0, 0]


def number(buffer: Tensor) -> int:
    """The number of the backward pass that wrote it; NEVER: none."""
    return _header(buffer)[0]


def copy(buffer: Tensor) -> Tensor:
    """The part of it that is in use, in the memory of the CPU: to be read later."""
    task, T, N, D, _ = _header(buffer)
    if task == NEVER:
        return make(HEADER, torch.device("cpu"))
    return buffer[: numbers(D, T, N)].to("cpu", copy=True)
