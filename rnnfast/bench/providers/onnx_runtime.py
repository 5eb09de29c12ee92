"""ONNX Runtime's kernels, forward alone."""

from __future__ import annotations

import importlib.util

import torch

from ..workload import Data, Workload
from . import onnx_model
from .layer import Layer


class OnnxRuntime:
    name = "onnxruntime"

    def unavailable(self, work: Workload) -> str:
        missing = [n for n in ("onnx", "onnxruntime") if importlib.util.find_spec(n) is None]
        return f"{missing[0]} is not installed" if missing else onnx_model.refusal(work)

    def build(self, work: Workload, data: Data) -> Layer:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        made = onnx_model.model(work, data)
        session = onnxruntime.InferenceSession(made, options, ["CPUExecutionProvider"])
        x = data.x.numpy()
        return onnx_model.layer(lambda: session.run(None, {"x": x}), "CPUExecutionProvider")
