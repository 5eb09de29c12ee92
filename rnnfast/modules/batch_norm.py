"""Batch norm over the valid points of padded sequences (Laurent et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..recurrence.tensors import without_padding
from ..values import values_of

MOMENTUM = 0.1


def batch_norm(
    u: Tensor,
    lengths: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor, Tensor] | None,
    training: bool,
    eps: float,
    momentum: float | None = MOMENTUM,
) -> Tensor:
    """Normalizes each feature of u [T, B, features] as nn.BatchNorm1d does, over the steps
    t < lengths[b] of all rows b. It computes in the dtype of ``weight`` and returns that of u.

    Args:
        running: mean and variance [features] and the number of batches, which training updates.
            None keeps none of them, in training alone.
        momentum: None for the mean over all batches.

    Raises:
        ValueError: training on a single point.
    """
    x = without_padding(u.to(weight.dtype), lengths)
    T, B, _ = u.shape
    if training:
        count = torch.full((), T * B, device=u.device) if lengths is None else lengths.sum()
        known = values_of(count)
        if known is not None and (known < 2).any():
            raise ValueError("Expected more than 1 value per channel when training")
        count = count.to(x.dtype)
        mean_here = x.sum((0, 1)) / count
        centred = without_padding(x - mean_here, lengths)
        variance_here = centred.square().sum((0, 1)) / count
        if running is not None:
            unbiased = variance_here * (count / (count - 1))
            _update(*running, mean_here, unbiased, momentum)
        mean, variance = mean_here, variance_here
    else:
        mean, variance, _ = running
    result = (x - mean.to(x.dtype)) * ((variance.to(x.dtype) + eps).rsqrt() * weight)
    return (result if bias is None else result + bias).to(u.dtype)


@torch.no_grad()
def _update(
    mean: Tensor,
    variance: Tensor,
    batches: Tensor,
    mean_here: Tensor,
    variance_here: Tensor,
    momentum: float | None,
) -> None:
    batches += 1
    for whole, here in ((mean, mean_here), (variance, variance_here)):
        part = batches.to(whole.dtype).reciprocal() if momentum is None else momentum
        whole.lerp_(here.to(whole.dtype), part)


def restart(statistics: dict[str, Tensor | None], suffixes: Iterable[str]) -> None:
    """Sets the running statistics to what they are before the first batch.

    Args:
        statistics: the buffers of the module, by name.
        suffixes: of the layers and directions, "_l0" or "_l0_reverse".
    """
    for suffix in suffixes:
        for kind, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            x = statistics.get(f"norm_{kind}{suffix}")
            if x is not None:
                x.fill_(value)


def _statistic(kind: str) -> property:
    def get(norm: BatchNorm) -> Tensor | None:
        return norm._statistics[f"norm_{kind}{norm._suffix}"]

    def put(norm: BatchNorm, value: Tensor | None) -> None:
        norm._statistics[f"norm_{kind}{norm._suffix}"] = value

    return property(get, put)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The batch norm of a layer and direction of rnnfast.RNN. Code that looks for batch norms in a
    model finds it: torch.optim.swa_utils.update_bn, or code that puts them into evaluation mode.

    Momentum, mode and ``track_running_stats`` are its own. Weight, bias and statistics stay
    parameters and buffers of the RNN; ``running_mean`` and the like are other names of the buffers.

    Args:
        statistics: the buffers of the RNN.
        suffix: of the layer and direction, "_l0" or "_l0_reverse".
    """

    # Properties, because nn.Module would keep tensors of its own under these names.
    running_mean = _statistic("running_mean")
    running_var = _statistic("running_var")
    num_batches_tracked = _statistic("num_batches_tracked")

    def __init__(
        self, num_features: int, eps: float, statistics: dict[str, Tensor | None], suffix: str
    ) -> None:
        nn.Module.__init__(self)  # _BatchNorm's would make statistics and parameters
        self.num_features, self.eps, self.momentum = num_features, eps, MOMENTUM
        self.affine, self.track_running_stats = False, True
        self.weight = self.bias = None
        self._statistics, self._suffix = statistics, suffix

    def normalize(
        self,
        u: Tensor,
        lengths: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        running: tuple[Tensor | None, ...],
    ) -> Tensor:
        """:func:`batch_norm` with the statistics that nn.BatchNorm1d would use in this mode."""
        complete = all(x is not None for x in running)
        training = self.training or not complete
        used = running if complete and (self.track_running_stats or not training) else None
        return batch_norm(u, lengths, weight, bias, used, training, self.eps, self.momentum)

    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError(
            'BatchNorm: this is part of an rnnfast.RNN with norm="batch"; call the RNN'
        )

    def _load_from_state_dict(self, *arguments) -> None:
        nn.Module._load_from_state_dict(self, *arguments)  # _BatchNorm's would look for statistics
