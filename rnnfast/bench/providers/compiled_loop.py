"""The loop of torch's modules under torch.compile, which unrolls it."""

from __future__ import annotations

import torch
from torch import nn

from ..workload import Workload
from .loop import Loop

LONGEST = 32  # steps; compiling takes longer with each step, minutes from 100 on


class CompiledLoop(Loop):
    name = "compiled loop"
    how = "torch.compile"

    def unavailable(self, work: Workload) -> str:
        if work.T > LONGEST:
            return f"it would be unrolled: measured up to T = {LONGEST}"
        return super().unavailable(work)

    def call(self, module: nn.Module):
        torch.compiler.reset()  # forgets the layer before, which has the same code
        return torch.compile(module)
