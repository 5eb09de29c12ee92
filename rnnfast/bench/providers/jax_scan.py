"""jax.lax.scan under jit. The input projection is one product outside of the scan."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..workload import BOTH, FORWARD, Data, Workload
from .layer import Layer

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class JaxScan:
    name = "jax"

    def unavailable(self, work: Workload) -> str:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed"
        return "" if work.plain and work.device == "cpu" else "measured on the CPU, plain layers"

    def build(self, work: Workload, data: Data) -> Layer:
        jax, forward, both = _functions()
        tensors = (data.x, data.g, *(data.weights[name] for name in NAMES))
        x, g, *weights = (jax.numpy.array(tensor.numpy()) for tensor in tensors)

        def results() -> dict[str, Tensor]:
            y, h_n, *gradients = (torch.tensor(jax.device_get(v)) for v in both(g, x, *weights))
            names = ["dx", *(f"d{name}" for name in NAMES)]
            return {"y": y, "h_n": h_n.unsqueeze(0)} | dict(zip(names, gradients))

        calls = {
            FORWARD: lambda: jax.block_until_ready(forward(x, *weights)),
            BOTH: lambda: jax.block_until_ready(both(g, x, *weights)),
        }
        return Layer(calls, results, how="XLA")


@functools.cache
def _functions():
    """(jax, forward, both). jax compiles them for each shape."""
    os.environ["NPROC"] = str(torch.get_num_threads())  # XLA reads the size of its pool here
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
