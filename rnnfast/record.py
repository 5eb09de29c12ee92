"""The layout of what backward measures: sums over the entries of a step, from which the norms come.

One buffer per layer, int64 so that no cast of a module touches it, read as float64: a header, then
[D, T, N, fields], N being the batch or, summed over it, 1. The header says which backward pass
wrote it, T, N and D, and whether da was stored in float16, whose range ends early. A buffer keeps
its address while it is large enough, as CUDA graphs need.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS = (
    "state_squares",  # of dh_t before clipping
    "carry_squares",  # of what came back from the step after
    "clipped_squares",  # of dh_t after clipping
    "preact_squares",  # of da_t
    "state_max",  # largest |dh_t|
    "slopes",  # sum of |f'(n_t)|
    "nonfinite_grad",  # how many entries of dh_t or da_t are not finite
    "nonfinite_state",  # how many of h_t
    "entries",  # how many there are
    "carried",  # how many of them the step after has sent a gradient back to
)
HEADER = 5
NEVER = -2  # the number of a backward pass; -1 stands for one outside of autograd


def numbers(D: int, T: int, N: int) -> int:
    """The size of a buffer that has room for so much."""
    return HEADER + D * T * N * len(FIELDS)


def make(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), NEVER, dtype=torch.int64, device=device)


def readable(buffer: Tensor) -> bool:
    """Whether it has values: one on the meta device, or made under FakeTensorMode, has none."""
    return type(buffer) is Tensor and buffer.device.type != "meta"


def begin(buffer: Tensor, D: int, T: int, N: int, dtype: torch.dtype) -> Tensor:
    """Where the running backward pass, which stores da in dtype, puts its [D, T, N, fields]."""
    header = [torch._C._current_graph_task_id(), T, N, D, dtype == torch.float16]
    if buffer.device.type == "cpu":
        buffer[:HEADER] = torch.tensor(header)
    else:  # a copy from the host would synchronize, and cannot be in a CUDA graph
        for i, value in enumerate(header):
            buffer[i].fill_(value)
    return buffer[HEADER : numbers(D, T, N)].view(torch.float64).view(D, T, N, len(FIELDS))


def read(buffer: Tensor) -> tuple[int, bool, Tensor]:
    """Which backward pass wrote it (NEVER: none), whether in float16, and its
    [D, T, N, fields], which the next one writes over."""
    task, T, N, D, half = buffer[:HEADER].tolist()
    if task == NEVER:
        return task, False, torch.empty(0, 0, 0, len(FIELDS), dtype=torch.float64)
    found = buffer[HEADER : numbers(D, T, N)].view(torch.float64).view(D, T, N, len(FIELDS))
    return task, bool(half), found


def copy(buffer: Tensor) -> Tensor:
    """What of it is in use, in the memory of the CPU: to be read later."""
    task, T, N, D, _ = buffer[:HEADER].tolist()
    used = HEADER if task == NEVER else numbers(D, T, N)
    return buffer[:used].to("cpu", copy=True)
