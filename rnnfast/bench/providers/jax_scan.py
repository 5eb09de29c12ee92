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
        return Layer(calls, results, how="XLA")


@functools.cache
def _functions(cell: str):
    """(jax, forward, both). jax compiles them for each shape."""
    os.environ["NPROC"] = str(torch.get_num_threads())  # XLA reads the size of its pool here
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")

    s = jax.nn.sigmoid

    def rnn_tanh(states, p_t, u):
        h = jnp.tanh(p_t + u)
        return (h,)

    def lstm(states, p_t, u):
        i, f, g, o = jnp.split(p_t + u, 4, -1)
        c = s(f) * states[1] + s(i) * jnp.tanh(g)
        return s(o) * jnp.tanh(c), c

    def gru(states, p_t, u):
        (p_r, p_z, p_n), (u_r, u_z, u_n) = (jnp.split(v, 3, -1) for v in (p_t, u))
        n = jnp.tanh(p_n + s(p_r + u_r) * u_n)
        return (n + s(p_z + u_z) * (states[0] - n),)

    of_cell = {"rnn_tanh": rnn_tanh, "lstm": lstm, "gru": gru}[cell]
    number = 2 if cell == "lstm" else 1

    def layer(x, w_ih, w_hh, b_ih, b_hh):
        H = w_hh.shape[1]
        apart = b_hh if cell == "gru" else None  # b_hn stays inside the reset product
        p = x @ w_ih.T + (b_ih if cell == "gru" else b_ih + b_hh)

        def step(states, p_t):
            u = states[0] @ w_hh.T
            states = of_cell(states, p_t, u if apart is None else u + apart)
            return states, states[0]

        zeros = jnp.zeros((x.shape[1], H), x.dtype)
        last, y = jax.lax.scan(step, (zeros,) * number, p)
        return y, last

    def both(g, *arguments):
        y, pull_back, last = jax.vjp(layer, *arguments, has_aux=True)
        return y, last, *pull_back(g)

    return jax, jax.jit(layer), jax.jit(both)
