"""torch's own fused kernels (cuDNN on a GPU, a loop of operations on a CPU), for whole stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tracing import eager

if TYPE_CHECKING:
    from . import Problem

KERNELS = {"rnn_tanh": torch._VF.rnn_tanh, "rnn_relu": torch._VF.rnn_relu}


def unavailable(problem: Problem) -> str:
    if problem.cell not in KERNELS:
        return f"torch has no kernel for the cell {problem.cell}"
    if problem.projected:
        return "torch's kernels contain the input projection: they compute rnnfast.RNN alone"
    if problem.extras:
        return f"torch's kernels have no {', '.join(problem.extras)}"
    return ""


def layers(
    cell: str, x: Tensor, hx: Tensor, lengths: Tensor | None, options: tuple
) -> tuple[Tensor, Tensor]:
    """All layers: x [T, B, I], hx [L * D, B, H] -> y [T, B, D * H], h_n [L * D, B, H].

    ``options``: weights as in nn.RNN, bias, num_layers, dropout, training, bidirectional.
    """
    if lengths is None or x.shape[1] == 0:
        return KERNELS[cell](x, hx, *options, False)
    return _layers_to_lengths(cell, x, hx, lengths, options)


@eager(
    "torch's kernels take lengths as packed data, whose sizes depend on their values; the other "
    "backends take lengths into a graph"
)
def _layers_to_lengths(
    cell: str, x: Tensor, hx: Tensor, lengths: Tensor, options: tuple
) -> tuple[Tensor, Tensor]:
    # Packed data has no room for a length of 0: such a row takes one step of zeros, all dropped.
    empty = (lengths == 0).unsqueeze(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    place = torch.argsort(order)
    at_least_one = lengths[order].clamp(min=1).to("cpu")
    u, start = (torch.where(empty, 0, v)[:, order] for v in (x, hx))
    data, batch_sizes = torch._VF._pack_padded_sequence(u, at_least_one, False)
    data, h_n = packed_layers(cell, data, start, batch_sizes, options)
    y, _ = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, x.shape[0])
    y, h_n = y[:, place], h_n[:, place]
    return torch.where(empty, 0, y), torch.where(empty, hx.to(h_n.dtype), h_n)


def packed_layers(
    cell: str, data: Tensor, hx: Tensor, batch_sizes: Tensor, options: tuple
) -> tuple[Tensor, Tensor]:
    """The same on packed data [N, I], sorted by length."""
    return KERNELS[cell](data, batch_sizes, hx.contiguous(), *options)
