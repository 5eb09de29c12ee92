"""torch.nn.RNN, LSTM and GRU: cuDNN on a GPU, oneDNN (LSTM) or a loop of operations on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..workload import Data, Workload
from .layer import Layer, differentiated

MODULES = {"rnn_tanh": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class TorchRNN:
    name = "torch"

    def unavailable(self, work: Workload) -> str:
        return f"nn.RNN has no {work.norm} norm" if work.norm else ""

    def build(self, work: Workload, data: Data) -> Layer:
        both = work.directions == 2
        rnn = MODULES[work.cell](work.H, work.H, work.layers, bidirectional=both)
        rnn = rnn.to(data.x.device, data.x.dtype)
        rnn.load_state_dict(data.weights)

        def packed(x: Tensor) -> tuple:
            y, last = rnn(pack_padded_sequence(x, data.lengths))
            return pad_packed_sequence(y, total_length=work.T)[0], last

        call = rnn if data.lengths is None else packed
        return differentiated(rnn, call, data, algorithm(work))


def algorithm(work: Workload) -> str:
    """The algorithm that PyTorch asks cuDNN for, after aten/src/ATen/native/cudnn/RNN.cpp of torch
    2.11, from sm_80 on."""
    if work.device == "cpu":
        return "native"
    if work.packed or work.precision == "float64":
        return "cuDNN standard"
    if work.H <= 256:
        return "cuDNN persistent, small H"
    small = "forward persistent, small H; backward " if work.H <= 384 else ""
    chip = torch.cuda.get_device_properties()
    persistent = (
        (work.dtype, work.layers, work.directions) == (torch.float16, 1, 1)
        and (chip.multi_processor_count >= 98 and chip.major >= 8 and chip.minor != 6)
        and (work.H <= 1024 and work.H % 128 == 0)
        and (work.B % 8 == 0 and work.B <= 128)
        and (work.B < 96 or work.H < 896)
    )
    return f"cuDNN {small}{'persistent' if persistent else 'standard'}"
