"""What backward measured of the gradient on its way back through time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import record


class GradientFlow(NamedTuple):
    """Per layer, direction and real time step, over the valid entries of the batch and all units:
    float64, [num_layers, num_directions, T], or [..., T, B] with track_gradient_flow="sample".

    A layer that got no gradient reads NaN, as does the gain of a step that no row has.
    """

    state_norm: Tensor  # of dh_t = dL/dh_t, before clipping
    carry_norm: Tensor  # of the part of it that came back through time
    clipped_norm: Tensor  # of dh_t after clipping
    preact_norm: Tensor  # of da_t, after clipping and layer norm
    state_max: Tensor  # largest |dh_t|, before clipping
    gain: Tensor  # mean of |f'|
    nonfinite_grad: Tensor  # how many entries of dh_t or da_t are not finite
    nonfinite_state: Tensor  # how many of h_t


def read(buffers: list[list[Tensor]], per_sample: bool) -> GradientFlow | None:
    """Of the last backward pass that reached any of a module's layers; None where none has.

    A layer has several buffers where it needed more room. In one pass the first made was last.
    """
    found = [max(map(record.read, made), key=lambda pair: pair[0]) for made in buffers]
    last = max((task for task, _ in found), default=record.NEVER)
    if last == record.NEVER:
        return None
    shape = next(values.shape for task, values in found if task == last)
    nothing = torch.full(shape, torch.nan, dtype=torch.float64)
    layers = [values.cpu() if task == last else nothing for task, values in found]
    values = torch.stack(layers)  # [L, D, T, N, fields]
    by_name = dict(zip(record.FIELDS, values.unbind(-1)))
    fields = GradientFlow(
        *(by_name[f"{name}_squares"].sqrt() for name in ("state", "carry", "clipped", "preact")),
        by_name["state_max"],
        by_name["slopes"] / by_name["entries"],
        by_name["nonfinite_grad"],
        by_name["nonfinite_state"],
    )
    return fields if per_sample else GradientFlow(*(x.squeeze(-1) for x in fields))
