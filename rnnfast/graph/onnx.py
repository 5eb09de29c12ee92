"""A layer as a node of ONNX, RNN, LSTM or GRU, which torch.onnx.export(dynamo=True) puts into its
program."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..recurrence.groups import Options, Rows, States, Weights


class Node(NamedTuple):
    """ONNX's operation for a cell."""

    kind: str
    gates: tuple[int, ...]  # its gates, as places among those of the cell
    attributes: dict[str, object]  # of one direction


NODES = {
    "rnn_tanh": Node("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": Node("RNN", (0,), {"activations": ["Relu"]}),
    "rnn_sigmoid": Node("RNN", (0,), {"activations": ["Sigmoid"]}),
    "rnn_softplus": Node("RNN", (0,), {"activations": ["Softplus"]}),
    "lstm": Node("LSTM", (0, 3, 1, 2), {}),  # i, o, f, c
    "gru": Node("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, h
}
DTYPES = {torch.float32, torch.float64, torch.float16}
OPSET = 14  # the newest of these nodes but those of 22, which add bfloat16


def is_exporting() -> bool:
    """Whether torch.onnx.export is under way. It imports torch.onnx, which takes a second."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def node(
    x: Tensor, weights: Weights, states: States, rows: Rows, options: Options
) -> tuple[Tensor, ...]:
    """y and the last states as :func:`rnnfast.ops.layer` returns them, from one node. Truncated
    BPTT, clipping and the record change gradients alone, so the node has nothing of them.

    Raises:
        RuntimeError: the node cannot express this layer.
    """
    _check(x, weights.gamma, rows.reset, options)
    w_ih, b_ih, b_hh, w_hh = weights[:4]
    lengths, kind = rows.lengths, NODES[options.cell]
    T, B, width = x.shape
    D, H = options.directions, w_hh.shape[1]
    if w_ih is None:  # x is the projection already
        w_ih = torch.eye(width, dtype=x.dtype, device=x.device)
    bias = None
    if b_hh is not None:
        b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
        bias = torch.cat([_in_order(b, kind, D) for b in (b_ih, b_hh)], 1).squeeze(2)
    names = CELLS[options.cell].states
    first = [getattr(states, name) for name in names]
    attributes = {n: v * D if isinstance(v, list) else v for n, v in kind.attributes.items()}
    y, *last = torch.onnx.ops.symbolic_multi_out(
        kind.kind,
        (
            x,
            _in_order(w_ih, kind, D),
            _in_order(w_hh, kind, D),
            bias,
            None if lengths is None else lengths.to(torch.int32),
            *first,
        ),
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            **attributes,
        },
        dtypes=(x.dtype,) * (1 + len(names)),
        shapes=((T, D, B, H), *((D, B, H) for _ in names)),
        version=OPSET,
    )
    if lengths is not None:  # the node puts out 0 for a row without a step
        empty = (lengths == 0).unsqueeze(1)
        last = [v if s is None else torch.where(empty, s, v) for s, v in zip(first, last)]
    return y.transpose(1, 2).reshape(T, B, D * H), *last


def _in_order(weight: Tensor, kind: Node, D: int) -> Tensor:
    """[D * G * H] or [D * G * H, N] as [D, G * H, N], with the gates in the order of ONNX."""
    G = len(kind.gates)
    by_gate = weight.reshape(D, G, weight.shape[0] // (D * G), -1)
    if G == 1:
        return by_gate.flatten(1, 2)
    return torch.cat([by_gate[:, gate] for gate in kind.gates], 1)


def refuse_old_exporter() -> None:
    """
    Raises:
        RuntimeError: torch.onnx.export(dynamo=False) is under way.
    """
    if torch._C._get_tracing_state() is not None and is_exporting():
        raise RuntimeError(
            "torch.onnx.export: given dynamo=False, wanted dynamo=True for rnnfast's modules. "
            "rnnfast.to_torch(model) puts torch's in their place, which both exporters take"
        )


def _check(x: Tensor, gamma: Tensor | None, reset: Tensor | None, options: Options) -> None:
    extras = {
        'norm="layer"': gamma is not None,
        f"num_heads={options.heads}": options.heads > 1,
        "reset": reset is not None,
        "return_cell_states": options.all_cells,
        str(x.dtype): x.dtype not in DTYPES,
    }
    given = ", ".join(name for name, used in extras.items() if used)
    if given:
        kind = NODES[options.cell].kind
        raise RuntimeError(
            f"torch.onnx.export: given rnnfast.{kind} with {given}, wanted what ONNX's {kind} can "
            "express: a plain recurrence in float32, float64 or float16. (rnnfast.to_torch refuses "
            "it, too.) For a fixed number of time steps, export the program that "
            "run_decompositions makes with rnnfast.decompositions()"
        )
