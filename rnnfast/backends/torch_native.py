"""torch's own fused kernels (cuDNN on a GPU, a loop of operations on a CPU), for whole stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Problem

KERNELS = {"tanh": torch._VF.rnn_tanh, "relu": torch._VF.rnn_relu}


def unavailable(problem: Problem) -> str:
    if problem.nonlinearity not in KERNELS:
        return f"torch has no {problem.nonlinearity} RNN"
    if problem.projected:
        return "torch's kernels contain the input projection: they serve rnnfast.RNN alone"
    if problem.beyond:
        return f"torch's kernels have no {', '.join(problem.beyond)}"
    return ""


def layers(
    nonlinearity: str, x: Tensor, hx: Tensor, lengths: Tensor | None, options: tuple
) -> tuple[Tensor, Tensor]:
    """All layers: x [T, B, I], hx [L * D, B, H] -> y [T, B, D * H], h_n [L * D, B, H].

    ``options``: weights as in nn.RNN, bias, num_layers, dropout, training, bidirectional.
    """
    if lengths is None:
        return KERNELS[nonlinearity](x, hx, *options, False)
    # Variable lengths go in as packed data, which has no room for a length of 0.
    T, B, _ = x.shape
    lengths = lengths.to("cpu")
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    if order.numel() == 0:  # a step that nothing takes: all gradients are there, and 0
        none = torch.zeros((), dtype=torch.bool, device=x.device)
        zeros = torch.where(none, x[:1], 0), torch.where(none, hx, 0)
        step, h_n = KERNELS[nonlinearity](*zeros, *options, False)
        y = step.new_zeros(T, B, step.shape[2])
        return torch.where(none, step, y), hx.to(h_n.dtype, copy=True)
    rows = order.to(x.device)
    data, batch_sizes = torch._VF._pack_padded_sequence(x[:, rows], lengths[order], False)
    data, h_n = packed_layers(nonlinearity, data, hx[:, rows], batch_sizes, options)
    padded, _ = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, T)
    y = padded.new_zeros(T, B, padded.shape[2])
    return y.index_copy(1, rows, padded), hx.to(h_n.dtype).index_copy(1, rows, h_n)


def packed_layers(
    nonlinearity: str, data: Tensor, hx: Tensor, batch_sizes: Tensor, options: tuple
) -> tuple[Tensor, Tensor]:
    """The same on packed data [N, I], sorted by length."""
    return KERNELS[nonlinearity](data, batch_sizes, hx.contiguous(), *options)
