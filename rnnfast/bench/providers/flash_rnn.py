"""FlashRNN's Elman cell (NX-AI), its fused CUDA kernel, after a projection by F.linear."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..workload import Data, Workload
from .layer import Layer, differentiated

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class FlashRNN:
    name = "flashrnn"

    def unavailable(self, work: Workload) -> str:
        if importlib.util.find_spec("flashrnn") is None:
            return "flashrnn is not installed"
        if work.device != "cuda":
            return "it computes on a GPU"
        if work.cell != "rnn_tanh":
            return "it is asked for its RNN alone"
        if work.dtype == torch.float64 or work.norm or work.packed:
            return "it has no float64, norm or lengths"
        if work.layers * work.directions > 1:
            return "it has one layer of one direction"
        return ""

    def build(self, work: Workload, data: Data) -> Layer:
        from flashrnn import flashrnn

        module = nn.ParameterDict({n: nn.Parameter(data.weights[n].clone()) for n in NAMES})
        w_ih, w_hh, b_ih, b_hh = (module[n] for n in NAMES)
        H = work.H

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            p = F.linear(x, w_ih, b_ih).transpose(0, 1)  # batch first: [B, T, gates, heads, H]
            states, _ = flashrnn(
                p.unflatten(-1, (1, 1, H)),
                w_hh.view(1, 1, H, H),
                b_hh.view(1, 1, H),
                function="elman",
                backend="cuda_fused",
                dtype=str(work.dtype).removeprefix("torch."),
            )
            y = states[0].flatten(2).transpose(0, 1)
            return y, y[-1:]

        return differentiated(module, call, data, "cuda_fused")
