"""OpenVINO's sequence nodes of RNN, LSTM and GRU, inference only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .onnx_node import NodeProvider


class OpenVINO(NodeProvider):
    name = package = "openvino"
    how = "its node"

    def session(self, model: bytes, x: Tensor) -> Callable[[], Sequence]:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        request, inputs = compiled.create_infer_request(), {0: x.numpy()}

        def run() -> Sequence:
            found = request.infer(inputs, share_inputs=True, share_outputs=True)
            return [found[i] for i in range(len(compiled.outputs))]

        return run
