"""Layer norm inside the recurrence (Ba et al. 2016, eq. 4), and clipping of the state gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ahat and rstd [..., 1] over the last axis, with the biased variance."""
    centred = a - a.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # removes the rounding of the mean itself
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def layer_norm_back(
    dahat: Tensor, ahat: Tensor, rstd: Tensor, grad_rstd: Tensor | None = None
) -> Tensor:
    """da = rstd (dahat - mean(dahat) - ahat mean(dahat * ahat)). grad_rstd: a gradient that rstd
    itself receives, which a second derivative has."""
    along = (dahat * ahat).mean(-1, keepdim=True)
    if grad_rstd is not None:
        along = along + grad_rstd * rstd / ahat.shape[-1]
    return rstd * (dahat - dahat.mean(-1, keepdim=True) - ahat * along)


def clip(limit: float, *grads: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all states of a row and head [..., S], scaled by min(1, limit / norm) of
    all of them together; a norm that is inf or NaN scales by 1."""
    norms = [torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.float64) for g in grads]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    large = (norm > limit) & (norm < torch.inf)
    scale = limit / torch.where(large, norm, limit)
    return tuple(g * scale.to(g.dtype) for g in grads)


class Clipped(torch.autograd.Function):
    """The states as they are; their gradients are clipped, in a second derivative, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(limit: float, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.clone() for s in states)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.limit = inputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *clip(ctx.limit, *grads)


class ClippedInTransform(Clipped):
    """With forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def jvp(ctx, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tangents)
