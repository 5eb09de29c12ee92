"""Batch norm over the valid points of padded sequences (Laurent et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

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
    x = u.to(weight.dtype)
    mean, variance, batches = running
    if training:
        T, B, _ = u.shape
        if lengths is None:
            count = torch.tensor(T * B, device=u.device)
            valid = None
        else:
            count = lengths.sum()
            valid = (torch.arange(T, device=u.device).unsqueeze(1) < lengths).unsqueeze(2)
        if u.device.type == "cpu" and not torch.compiler.is_compiling() and count.item() < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        count = count.to(x.dtype)
        x_valid = x if valid is None else torch.where(valid, x, 0)
        mean_here = x_valid.sum((0, 1)) / count
        centred = x_valid - mean_here
        centred = centred if valid is None else torch.where(valid, centred, 0)
        variance_here = centred.square().sum((0, 1)) / count
        with torch.no_grad():
            mean.lerp_(mean_here.to(mean.dtype), MOMENTUM)
            unbiased = variance_here * (count / (count - 1))
            variance.lerp_(unbiased.to(variance.dtype), MOMENTUM)
            batches += 1
        mean, variance = mean_here, variance_here
    result = (x - mean.to(x.dtype)) * ((variance.to(x.dtype) + eps).rsqrt() * weight)
    return (result if bias is None else result + bias).to(u.dtype)
