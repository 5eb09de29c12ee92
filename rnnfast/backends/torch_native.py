"""torch's own fused kernels (cuDNN on a GPU, a loop of operations on a CPU), for whole stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tracing import eager

if TYPE_CHECKING:
    from . import Problem

Hx = Tensor | tuple[Tensor, Tensor]  # h, or h and c
KERNELS = {
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
}


def unavailable(problem: Problem) -> str:
    if problem.cell not in KERNELS:
        return f"torch has no kernel for the cell {problem.cell}"
    if problem.projected:
        return "torch's kernels contain the input projection: they compute modules alone"
    if problem.extras:
        return f"torch's kernels have no {', '.join(problem.extras)}"
    return ""


def layers(
    cell: str, x: Tensor, hx: Hx, lengths: Tensor | None, options: tuple
) -> tuple[Tensor, Hx]:
    """All layers: x [T, B, I], hx [L * D, B, H] -> y [T, B, D * H], h_n [L * D, B, H]; hx and h_n
    are a pair of these for an LSTM.

    ``options``: weights as in nn.RNN, bias, num_layers, dropout, training, bidirectional.
    """
    if lengths is None or x.shape[1] == 0:
        y, *last = KERNELS[cell](x, hx, *options, False)
        return y, last[0] if len(last) == 1 else tuple(last)
    return _layers_to_lengths(cell, x, hx, lengths, options)


@eager(
    "torch's kernels take lengths as packed data, whose sizes depend on their values; the other "
    "backends take lengths into a graph"
)
def _layers_to_lengths(
    cell: str, x: Tensor, hx: Hx, lengths: Tensor, options: tuple
) -> tuple[Tensor, Hx]:
    # Packed data has no room for a length of 0: such a row takes one step of zeros, all dropped.
    empty = (lengths == 0).unsqueeze(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    place = torch.argsort(order)
    at_least_one = lengths[order].clamp(min=1).to("cpu")

    def sorted_(v: Tensor) -> Tensor:
        return torch.where(empty, 0, v)[:, order]

    def in_place(last: Tensor, first: Tensor) -> Tensor:
        return torch.where(empty, first.to(last.dtype), last[:, place])

    start = sorted_(hx) if isinstance(hx, Tensor) else tuple(map(sorted_, hx))
    data, batch_sizes = torch._VF._pack_padded_sequence(sorted_(x), at_least_one, False)
    data, h_n = packed_layers(cell, data, start, batch_sizes, options)
    y, _ = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, x.shape[0])
    last = in_place(h_n, hx) if isinstance(hx, Tensor) else tuple(map(in_place, h_n, hx))
    return torch.where(empty, 0, y[:, place]), last


def packed_layers(
    cell: str, data: Tensor, hx: Hx, batch_sizes: Tensor, options: tuple
) -> tuple[Tensor, Hx]:
    """The same on packed data [N, I], sorted by length."""
    hx = hx.contiguous() if isinstance(hx, Tensor) else tuple(v.contiguous() for v in hx)
    y, *last = KERNELS[cell](data, batch_sizes, hx, *options)
    return y, last[0] if len(last) == 1 else tuple(last)
