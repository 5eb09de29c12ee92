"""The parts of a short call's time: forward and all gradients of one layer, I = H, float32.

    .venv/bin/python bench/ladder/call_cost.py

Prints microseconds, the least of many short runs in turns: the whole call through rnnfast.RNN, the
same through nn.RNN, the backend alone (checks, allocation and kernel, no autograd), and an
autograd.Function with as many inputs that computes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.backends import cpu
from rnnfast.recurrence.groups import (
    Kept,
    Options,
    OutputGradients,
    Rows,
    Saved,
    States,
    Wanted,
    Weights,
)

SIZES = ((1, 1, 1), (128, 1, 64), (128, 16, 64))


class Nothing(torch.autograd.Function):
    """Returns y, and the inputs as their own gradients."""

    @staticmethod
    def forward(ctx, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors


def calls(T: int, B: int, H: int) -> dict[str, Callable[[], object]]:
    ours, theirs = rnnfast.RNN(H, H, backend="cpu"), nn.RNN(H, H)
    x, g = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in ours.parameters())
    weights = Weights(w_ih, b_ih, b_hh, w_hh)

    def both(module: nn.Module) -> object:
        return torch.autograd.grad(module(x)[0], [x, *module.parameters()], g)

    def backend() -> object:
        inputs = x.detach()
        y, *_ = cpu.forward(inputs, weights, States(), Rows(), Options())
        kept = Kept(inputs, y, weights, States(), Rows(), Saved())
        return cpu.backward(OutputGradients(g, States()), kept, None, Wanted(), Options())

    def nothing() -> object:
        leaves = [x, *ours.parameters()]
        return torch.autograd.grad(Nothing.apply(g.clone(), *leaves), leaves, g)

    return {
        "nn.RNN": lambda: both(theirs),
        "rnnfast.RNN": lambda: both(ours),
        "backend alone": backend,
        "empty autograd.Function": nothing,
    }


def least(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(60):
        for name, call in candidates.items():
            begin = time.perf_counter()
            for _ in range(10):
                call()
            times[name] = min(times[name], (time.perf_counter() - begin) / 10)
    return times


def main() -> None:
    torch.set_num_threads(2)
    for size in SIZES:
        found = least(calls(*size))
        print(size, ", ".join(f"{name} {s * 1e6:.0f}" for name, s in found.items()))


if __name__ == "__main__":
    main()
