"""The picture of a probe: the norm of a gradient over the lag, with its half-life and horizon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..drawing import Picture
from ..gradient_flow.picture import Panel, draw
from ..gradient_flow.text import name_of

if TYPE_CHECKING:
    from .probe import GradientProbe


def _sums(log_growth: Tensor) -> Tensor:
    """The sum up to each lag, 0 at lag 0."""
    return F.pad(log_growth[:, :, 1:].cumsum(2), (1, 0))


def draw_probes(probes: Mapping[str, GradientProbe]) -> Picture:
    """A panel for each layer and direction of each probe.

    Args:
        probes: by the RNN's name in its model; "" for an RNN that stands alone.
    """
    panels = []
    for name, probe in probes.items():
        prefix = f"{name}, layer" if name else "Layer"
        norm = probe.norm.masked_fill(probe.out_of_range, math.nan)
        own = norm[:, :, :1] * _sums(probe.log_growth).exp()
        lags = range(int(probe.samples.any(0).sum()))
        for layer, verdicts in enumerate(probe.verdicts):
            for d, verdict in enumerate(verdicts):
                state = probe.flow.cell.memory
                curves = {
                    f"$v^T dh_{{end}}/d{state}_t$, root mean square over samples": norm[layer, d],
                    "by this layer's own steps alone": own[layer, d],
                }
                panels.append(
                    Panel(
                        f"{prefix} {name_of(layer, d)}: {verdict.word}",
                        "lag: steps back from the last state",
                        "norm of the gradient",
                        lags,
                        {label: y[: len(lags)].tolist() for label, y in curves.items()},
                        (0, norm[layer, d, 0].item()),
                        1,
                        probe.half_life[layer, d].item(),
                        probe.horizon[layer, d].item(),
                    )
                )
    return draw(panels, "The influence of each step on the last state")
