"""One layer as an ONNX model of a single node, for runtimes of ONNX."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workload import FORWARD, Data, Workload
from .layer import Layer

OPERATORS = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}
GATES = {"rnn_tanh": [0], "lstm": [0, 3, 1, 2], "gru": [1, 0, 2]}  # of torch, in ONNX's order


def refusal(work: Workload) -> str:
    """Why a runtime does not get this workload; "" if it does."""
    plain = not work.beyond() and work.device == "cpu"
    return "" if plain else "measured on the CPU, plain layers"


def model(work: Workload, data: Data) -> bytes:
    """x [T, B, H] -> y [T, 1, B, H], h_n and, of an LSTM, c_n [1, B, H]."""
    from onnx import TensorProto, helper, numpy_helper

    gates = GATES[work.cell]

    def ordered(w: Tensor) -> Tensor:
        return torch.stack(w.chunk(len(gates)))[gates].flatten(0, 1)

    w = {name: ordered(tensor) for name, tensor in data.weights.items()}
    values = {
        "W": w["weight_ih_l0"][None],
        "R": w["weight_hh_l0"][None],
        "B": torch.cat([w["bias_ih_l0"], w["bias_hh_l0"]])[None],
    }
    results = ["y", "h_n", *(["c_n"] if work.cell == "lstm" else [])]
    more = {"linear_before_reset": 1} if work.cell == "gru" else {}
    node = helper.make_node(
        OPERATORS[work.cell], ["x", *values], results, hidden_size=work.H, **more
    )

    def value(name: str, shape: list[int]):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    T, B, H = work.size
    outputs = [value("y", [T, 1, B, H]), *(value(name, [1, B, H]) for name in results[1:])]
    weights = [numpy_helper.from_array(v.contiguous().numpy(), name) for name, v in values.items()]
    graph = helper.make_graph([node], "layer", [value("x", [T, B, H])], outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


def layer(run, how: str) -> Layer:
    """
    Args:
        run: computes forward and returns numpy arrays y, h_n and, of an LSTM, c_n.
    """

    def results() -> dict[str, Tensor]:
        y, *last = (torch.tensor(v) for v in run())
        return {"y": y.squeeze(1)} | dict(zip(("h_n", "c_n"), last))

    return Layer({FORWARD: run}, results, how=how)
