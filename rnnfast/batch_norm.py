"""Batch norm over the valid points of padded sequences (Laurent et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiler import makes_program
from .layout import without_padding

MOMENTUM = 0.1


def batch_norm(
    u: Tensor,
    lengths: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor, Tensor],
    training: bool,
    eps: float,
) -> Tensor:
    """As nn.BatchNorm1d for each feature of u [T, B, features], over t < lengths[b] of all b.

    running: mean and variance [features] and the number of batches, which training brings up to
    date. Computed in the dtype of ``weight``; the result has that of u.

    Raises:
        ValueError: training on a single point.
    """
    x = without_padding(u.to(weight.dtype), lengths)
    T, B, _ = u.shape
    mean, variance, batches = running
    if training:
        count = torch.full((), T * B, device=u.device) if lengths is None else lengths.sum()
        unseen = u.device.type != "cpu" or torch.compiler.is_compiling() or makes_program()
        if not unseen and count.item() < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        count = count.to(x.dtype)
        mean_here = x.sum((0, 1)) / count
        centred = without_padding(x - mean_here, lengths)
        variance_here = centred.square().sum((0, 1)) / count
        with torch.no_grad():
            mean.lerp_(mean_here.to(mean.dtype), MOMENTUM)
            unbiased = variance_here * (count / (count - 1))
            variance.lerp_(unbiased.to(variance.dtype), MOMENTUM)
            batches += 1
        mean, variance = mean_here, variance_here
    result = (x - mean.to(x.dtype)) * ((variance.to(x.dtype) + eps).rsqrt() * weight)
    return (result if bias is None else result + bias).to(u.dtype)
