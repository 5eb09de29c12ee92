"""ONNX Runtime's RNN, LSTM and GRU nodes, inference only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .onnx_node import NodeProvider


class OnnxRuntime(NodeProvider):
    """Its threads spin after a call, as is the library's default: without, it is slower."""

    name = package = "onnxruntime"
    how = "its node"

    def session(self, model: bytes, x: Tensor) -> Callable[[], Sequence]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {"x": x.numpy()}
        return lambda: session.run(None, inputs)
