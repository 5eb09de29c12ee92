"""jax.lax.scan under jit. The input projection is one product outside of the scan."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..workload import BOTH, FORWARD, Data, Workload
from .jax_cells import step_of
from .layer import Layer

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class JaxScan:
    name = "jax"

    def unavailable(self, work: Workload) -> str:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed"
        plain = not work.beyond() and work.device == "cpu"
        return "" if plain else "measured on the CPU, plain layers"

    def build(self, work: Workload, data: Data) -> Layer:
        jax, forward, both = _functions(work.cell)
        tensors = (data.x, data.g, *(data.weights[name] for name in NAMES))
        x, g, *weights = (jax.numpy.array(tensor.numpy()) for tensor in tensors)

        def results() -> dict[str, Tensor]:
            y, last, *gradients = jax.tree.map(
                lambda v: torch.tensor(jax.device_get(v)), both(g, x, *weights)
            )
            states = {name: v.unsqueeze(0) for name, v in zip(("h_n", "c_n"), last)}
            names = ["dx", *(f"d{name}" for name in NAMES)]
            return {"y": y, **states} | dict(zip(names, gradients))

        calls = {
            FORWARD: lambda: jax.block_until_ready(forward(x, *weights)),
            BOTH: lambda: jax.block_until_ready(both(g, x, *weights)),
        }
        return Layer(calls, results, how="XLA", own_block=True)


@functools.cache
def _functions(cell: str):
    """(jax, forward, both). jax compiles them for each shape."""
    os.environ["NPROC"] = str(torch.get_num_threads())  # XLA reads the size of its pool here
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")

    of_cell = step_of(cell)
    number = 2 if cell == "lstm" else 1

    def layer(x, w_ih, w_hh, b_ih, b_hh):
        inside = b_hh if cell == "gru" else 0  # b_hn is in the reset product
        p = x @ w_ih.T + (b_ih if cell == "gru" else b_ih + b_hh)

        def step(states, p_t):
            states = of_cell(states, p_t, states[0] @ w_hh.T + inside)
            return states, states[0]

        zeros = jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype)
        last, y = jax.lax.scan(step, (zeros,) * number, p)
        return y, last

    def both(g, *arguments):
        y, pull_back, last = jax.vjp(layer, *arguments, has_aux=True)
        return y, last, *pull_back(g)

    return jax, jax.jit(layer), jax.jit(both)
