"""OpenVINO's CPU plugin, forward alone."""

from __future__ import annotations

import importlib.util

import torch

from ..workload import Data, Workload
from . import onnx_model
from .layer import Layer


class OpenVino:
    name = "openvino"

    def unavailable(self, work: Workload) -> str:
        missing = [n for n in ("onnx", "openvino") if importlib.util.find_spec(n) is None]
        return f"{missing[0]} is not installed" if missing else onnx_model.refusal(work)

    def build(self, work: Workload, data: Data) -> Layer:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
            "PERFORMANCE_HINT": "LATENCY",
        }
        made = core.read_model(onnx_model.model(work, data))
        request = core.compile_model(made, "CPU", settings).create_infer_request()
        x = data.x.numpy()
        return onnx_model.layer(lambda: list(request.infer({"x": x}).values()), "CPU plugin")
