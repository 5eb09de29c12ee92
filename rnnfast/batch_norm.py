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
    T, B, _ = u.shape
    valid = None
    if lengths is not None:  # padding may be anything: 0 times NaN is NaN
        valid = (torch.arange(T, device=u.device).unsqueeze(1) < lengths).unsqueeze(2)
        x = torch.where(valid, x, 0)
    mean, variance, batches = running
    if training:
        count = torch.full((), T * B, device=u.device) if lengths is None else lengths.sum()
        if u.device.type == "cpu" and not torch.compiler.is_compiling() and count.item() < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        count = count.to(x.dtype)
        mean_here = x.sum((0, 1)) / count
        centred = x - mean_here
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
