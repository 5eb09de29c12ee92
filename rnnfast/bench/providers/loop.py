"""A layer-normalized RNN without rnnfast: a Python loop over torch's modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..workload import Data, Workload
from .layer import Layer, differentiated


class NormedLoop(nn.Module):
    """One layer. The input's nn.Linear runs once for all steps, or at each step."""

    def __init__(self, H: int, at_once: bool = True) -> None:
        super().__init__()
        self.inputs, self.state, self.norm = nn.Linear(H, H), nn.Linear(H, H), nn.LayerNorm(H)
        self.at_once = at_once

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1:])
        steps = []
        for x_t in (self.inputs(x) if self.at_once else x).unbind():
            p = x_t if self.at_once else self.inputs(x_t)
            h = torch.tanh(self.norm(p + self.state(h)))
            steps.append(h)
        return torch.stack(steps), h.unsqueeze(0)


# {name in the loop: name in rnnfast.RNN}
NAMES = {
    "inputs.weight": "weight_ih_l0",
    "inputs.bias": "bias_ih_l0",
    "state.weight": "weight_hh_l0",
    "state.bias": "bias_hh_l0",
    "norm.weight": "norm_weight_l0",
    "norm.bias": "norm_bias_l0",
}


class Loop:
    name = "loop"

    def unavailable(self, work: Workload) -> str:
        if not work.norm or work.layers * work.directions > 1 or work.packed:
            return "it is written for one layer of one direction with layer norm"
        return ""

    def build(self, work: Workload, data: Data) -> Layer:
        module = NormedLoop(work.H).to(data.x.device, data.x.dtype)
        module.load_state_dict({ours: data.weights[theirs] for ours, theirs in NAMES.items()})
        layer = differentiated(module, self.call(module), data, self.how)

        def results() -> dict[str, Tensor]:
            found = of_loop()
            return {f"d{NAMES[n[1:]]}" if n[1:] in NAMES else n: v for n, v in found.items()}

        of_loop, layer.results = layer.results, results
        return layer

    how = "nn.Linear, nn.LayerNorm and tanh a step"

    def call(self, module: nn.Module):
        return module
