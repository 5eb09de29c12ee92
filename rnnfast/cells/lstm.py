"""The LSTM cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000)."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Cell, StepGradients, Tensors


def _step(a: Tensor, u: Tensor, before: Tensors, parameters: Tensors) -> tuple[Tensors, Tensors]:
    a_i, a_f, a_g, a_o = a.unbind()
    c_prev = before[1]
    i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
    c = f * c_prev + i * g
    # a_f, not f: in 16 bits an f of 0.999 is stored as 1, and nothing would be forgotten.
    return (o * c.tanh(), c), (i, a_f, g, o, c_prev)


def _step_back(
    grads: Tensors, before: Tensors, h: Tensor, saved: Tensors, a: Tensor | None, _: Tensors
) -> StepGradients:
    (dh, dc), (i, a_f, g, o, c_prev) = grads, saved
    f = a_f.sigmoid()
    tanh = (f * c_prev + i * g).tanh()
    dc = dc + dh * o * (1 - tanh * tanh)
    gates = (
        dc * g * (i * (1 - i)),
        dc * c_prev * (f * (-a_f).sigmoid()),  # 1 - f is exact near f = 1
        dc * i * (1 - g * g),
        dh * tanh * (o * (1 - o)),
    )
    return StepGradients(torch.stack(gates), direct=(torch.zeros_like(dh), dc * f), total=dc)


def _saved_back(grads: Tensors, saved: Tensors) -> StepGradients:
    (of_i, of_f, of_g, of_o, of_c), (i, _, g, o, _) = grads, saved
    gates = of_i * (i * (1 - i)), of_f, of_g * (1 - g * g), of_o * (o * (1 - o))
    return StepGradients(torch.stack(gates), direct=(torch.zeros_like(of_c), of_c))


def _gain(h: Tensor, saved: Tensors) -> Tensor:
    return saved[1].sigmoid()


def _states_before(h: Tensor, saved: Tensors) -> Tensors:
    return h, saved[4]


LSTM = Cell(
    name="lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    step=_step,
    step_back=_step_back,
    gain=_gain,
    saved=("i", "a_f", "g", "o", "c_prev"),
    saved_back=_saved_back,
    states_before=_states_before,
    norm="recurrent",
    gain_name="f",
)
CELLS = (LSTM,)
