"""Layer norm inside the recurrence (Ba et al. 2016, eq. 4)."""

from __future__ import annotations

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
