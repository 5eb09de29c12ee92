"""A step of each cell in jax: (states, p_t, u = W_hh h, with b_hh for a GRU) -> states."""

from __future__ import annotations

from collections.abc import Callable


def step_of(cell: str) -> Callable:
    import jax
    import jax.numpy as jnp

    s = jax.nn.sigmoid

    def rnn_tanh(states, p_t, u):
        return (jnp.tanh(p_t + u),)

    def lstm(states, p_t, u):
        i, f, g, o = jnp.split(p_t + u, 4, -1)
        c = s(f) * states[1] + s(i) * jnp.tanh(g)
        return s(o) * jnp.tanh(c), c

    def gru(states, p_t, u):
        (p_r, p_z, p_n), (u_r, u_z, u_n) = (jnp.split(v, 3, -1) for v in (p_t, u))
        n = jnp.tanh(p_n + s(p_r + u_r) * u_n)
        return (n + s(p_z + u_z) * (states[0] - n),)

    return {"rnn_tanh": rnn_tanh, "lstm": lstm, "gru": gru}[cell]
