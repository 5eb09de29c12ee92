"""A layer as an ONNX model of one node, for the libraries that infer such a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...graph.onnx import NODES, OPSET
from ..workload import FORWARD, Data, Workload
from .layer import Layer

OUTPUTS = ("y", "h_n", "c_n")


class NodeProvider:
    """Inference only. A library adds ``name``, its ``package`` and ``session``."""

    name: str
    package: str
    how = ""

    def unavailable(self, work: Workload) -> str:
        for package in (self.package, "onnx"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        plain = not work.beyond() and work.device == "cpu"
        return "" if plain else "measured on the CPU, plain layers"

    def session(self, model: bytes, x: Tensor) -> Callable[[], Sequence]:
        """A call that returns y [T, 1, B, H], h_n and c_n, if any, as arrays."""
        raise NotImplementedError

    def build(self, work: Workload, data: Data) -> Layer:
        run = self.session(model(work, data), data.x)

        def results() -> dict[str, Tensor]:
            y, *last = (torch.tensor(array) for array in run())
            return dict(zip(OUTPUTS, (y.squeeze(1), *last)))

        return Layer({FORWARD: run}, results, how=self.how, own_block=True)


def model(work: Workload, data: Data) -> bytes:
    """The node with data's weights as constants, and fixed shapes."""
    from onnx import TensorProto, helper, numpy_helper

    node, states = NODES[work.cell], 2 if work.cell == "lstm" else 1

    def ordered(name: str) -> Tensor:
        gates = data.weights[name].chunk(len(node.gates))
        return torch.cat([gates[place] for place in node.gates]).unsqueeze(0)

    biases = [ordered("bias_ih_l0"), ordered("bias_hh_l0")]
    weights = {
        "w": ordered("weight_ih_l0"),
        "r": ordered("weight_hh_l0"),
        "b": torch.cat(biases, 1),
    }
    T, B, H = work.size
    names = OUTPUTS[: 1 + states]
    shapes = dict(zip(OUTPUTS, [(T, 1, B, H), (1, B, H), (1, B, H)]))
    made = helper.make_node(node.kind, ["x", *weights], names, hidden_size=H, **node.attributes)
    graph = helper.make_graph(
        [made],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (T, B, H))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in names],
        [numpy_helper.from_array(w.numpy(), n) for n, w in weights.items()],
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
