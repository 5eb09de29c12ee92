"""The layer that a provider builds. Most providers build a module that PyTorch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..workload import BOTH, FORWARD, STEP, Data


@dataclass
class Layer:
    """``calls`` by name: FORWARD keeps nothing for gradients. BOTH computes forward and all
    gradients: those of x and of the parameters. STEP ends with an optimizer's step. On a CPU each
    returns when the results are there. A layer without BOTH has no gradients in its results."""

    calls: dict[str, Callable[[], object]]
    # y, h_n, c_n of an LSTM; with BOTH also dx, and d<name> of each of data.weights
    results: Callable[[], dict[str, Tensor]]
    saved_bytes: Callable[[], int | None] = lambda: None  # for backward; None: unknown
    how: str = ""  # the algorithm or kernel
    estimated_us_per_step: float | None = None  # of forward; None: there is no estimate
    own_block: bool = False  # threads spin after a call, so no other layer takes turns with it


def differentiated(
    module: nn.Module,
    call: Callable[[Tensor], tuple],
    data: Data,
    how: str = "",
) -> Layer:
    """
    Args:
        module: has the parameters of data.weights.
        call: x [T, B, H] -> y [T, B, D * H] and h_n [D, B, H], or (h_n, c_n).
    """
    parameters = dict(module.named_parameters())
    x = data.x.clone().requires_grad_()
    leaves = [x, *parameters.values()]
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)  # a rate of 0 keeps the weights

    def forward() -> tuple:
        with torch.no_grad():
            return call(x)

    def both() -> tuple:
        y, last = call(x)
        return y, last, *torch.autograd.grad(y, leaves, data.g)

    def step() -> None:
        optimizer.zero_grad()
        y, _ = call(data.x)
        y.backward(data.g)
        optimizer.step()

    def results() -> dict[str, Tensor]:
        y, last, *gradients = both()
        names = ["dx", *(f"d{name}" for name in parameters)]
        found = {name: x.detach() for name, x in zip(("y", "h_n", "c_n"), (y, *states(last)))}
        return found | dict(zip(names, gradients))

    calls = {FORWARD: forward, BOTH: both, STEP: step}
    return Layer(calls, results, lambda: saved_bytes(call, x, list(parameters.values())), how)


def states(last: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return (last,) if isinstance(last, Tensor) else tuple(last)


def saved_bytes(call: Callable[[Tensor], tuple], x: Tensor, parameters: list[Tensor]) -> int:
    """Bytes that only backward needs, without input, parameters and outputs."""
    kept: list[Tensor] = []  # kept until they are counted, so that addresses differ

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, last = call(x)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    for tensor in (x, *parameters, y, *states(last)):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
