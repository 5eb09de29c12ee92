"""Who computes the layer. A provider turns a Problem into calls that all do the same work.

A new one is a class with ``name``, ``unavailable()`` and ``build()``, and an entry in PROVIDERS.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.backends import cpu


class Problem(NamedTuple):
    """One layer, tanh, h_0 = 0; the loss is sum(y * g)."""

    x: Tensor  # [T, B, H]
    g: Tensor  # [T, B, H]
    w_ih: Tensor  # [H, H]
    w_hh: Tensor  # [H, H]
    b_ih: Tensor  # [H]
    b_hh: Tensor  # [H]


def make_problem(T: int, B: int, H: int, seed: int = 0) -> Problem:
    """Weights as torch starts them; x and g normal."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(T, B, H, generator=generator) for _ in range(2))
    bound = 1 / math.sqrt(H)
    shapes = [(H, H), (H, H), (H,), (H,)]
    return Problem(
        x, g, *(torch.empty(s).uniform_(-bound, bound, generator=generator) for s in shapes)
    )


class Layer(NamedTuple):
    """What a provider built. ``forward`` keeps nothing for gradients; ``both`` is forward and the
    gradients of x and of all four parameters. Each returns when all is computed."""

    forward: Callable[[], object]
    both: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]  # y, h_n, dx, dw_ih, dw_hh, db_ih, db_hh
    saved_bytes: Callable[[], int | None]  # kept for backward; None where nobody can say


class Provider(Protocol):
    name: str

    def unavailable(self) -> str: ...  # why it cannot be measured here; "" if it can

    def build(self, problem: Problem) -> Layer: ...


GRADIENTS = ("dx", "dw_ih", "dw_hh", "db_ih", "db_hh")


class Module:
    """A module with the parameters of nn.RNN, differentiated by torch.autograd."""

    def __init__(self, name: str, make: Callable[[int], nn.Module]) -> None:
        self.name, self.make = name, make

    def unavailable(self) -> str:
        return cpu.WHY_MISSING if self.name == "rnnfast" and cpu._C is None else ""

    def build(self, problem: Problem) -> Layer:
        rnn = self.make(problem.w_hh.shape[0])
        parameters = list(rnn.parameters())  # in the order of Problem
        with torch.no_grad():
            for parameter, value in zip(parameters, problem[2:]):
                parameter.copy_(value)
        x = problem.x.clone().requires_grad_()
        leaves = [x, *parameters]

        def forward() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return rnn(x)

        def both() -> tuple[Tensor, ...]:
            y, h_n = rnn(x)
            return y, h_n, *torch.autograd.grad(y, leaves, problem.g)

        def results() -> dict[str, Tensor]:
            y, h_n, *gradients = both()
            return {"y": y.detach(), "h_n": h_n.detach()} | dict(zip(GRADIENTS, gradients))

        return Layer(forward, both, results, lambda: saved_bytes(rnn, x))


def saved_bytes(rnn: nn.Module, x: Tensor) -> int:
    """Memory that only the backward pass needs: not that of input, parameters and outputs."""
    kept: list[Tensor] = []  # alive until counted, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, h_n = rnn(x)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    for tensor in (x, *rnn.parameters(), y, h_n):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class JaxScan:
    """jax.lax.scan under jit, the input projection as one product outside of it."""

    name = "jax"

    def unavailable(self) -> str:
        return "" if importlib.util.find_spec("jax") else "jax is not installed"

    def build(self, problem: Problem) -> Layer:
        jax, forward, both = _jax_functions()
        x, g, *weights = (jax.numpy.array(tensor.numpy()) for tensor in problem)

        def results() -> dict[str, Tensor]:
            y, h_n, *gradients = (torch.tensor(jax.device_get(v)) for v in both(g, x, *weights))
            return {"y": y, "h_n": h_n.unsqueeze(0)} | dict(zip(GRADIENTS, gradients))

        return Layer(
            lambda: jax.block_until_ready(forward(x, *weights)),
            lambda: jax.block_until_ready(both(g, x, *weights)),
            results,
            lambda: None,
        )


@functools.cache
def _jax_functions():
    """(jax, forward, both); jax compiles them anew for each shape."""
    os.environ["NPROC"] = str(torch.get_num_threads())  # where XLA looks for the size of its pool
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")

    def layer(x, w_ih, w_hh, b_ih, b_hh):
        def step(h, p_t):
            h = jnp.tanh(p_t + h @ w_hh.T)
            return h, h

        p = x @ w_ih.T + (b_ih + b_hh)
        h_n, y = jax.lax.scan(step, jnp.zeros_like(p[0]), p)
        return y, h_n

    def both(g, *arguments):
        y, pull_back, h_n = jax.vjp(layer, *arguments, has_aux=True)
        return y, h_n, *pull_back(g)

    return jax, jax.jit(layer), jax.jit(both)


PROVIDERS: tuple[Provider, ...] = (
    Module("torch", lambda H: nn.RNN(H, H)),
    Module("rnnfast", lambda H: rnnfast.RNN(H, H, backend="cpu")),
    JaxScan(),
)
