"""A layer as ONNX's RNN node, which torch.onnx.export(dynamo=True) puts into its program."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..recurrence.groups import Options, Rows, States, Weights

ACTIVATIONS = {
    "rnn_tanh": "Tanh",
    "rnn_relu": "Relu",
    "rnn_sigmoid": "Sigmoid",
    "rnn_softplus": "Softplus",
}
DTYPES = {torch.float32, torch.float64, torch.float16}
OPSET = 14  # the newest RNN but that of 22, which adds bfloat16


def is_exporting() -> bool:
    """Whether torch.onnx.export is under way. It imports torch.onnx, which takes a second."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def node(
    x: Tensor, weights: Weights, states: States, rows: Rows, options: Options
) -> tuple[Tensor, Tensor]:
    """y and h_n as :func:`rnnfast.ops.layer` returns them, from one node. Truncated BPTT,
    clipping and the record change gradients alone, so the node has nothing of them.

    Raises:
        RuntimeError: the node cannot express this layer.
    """
    _check(x, weights.gamma, rows.reset, options)
    w_ih, b_ih, b_hh, w_hh = weights[:4]
    h_0, lengths = states.h, rows.lengths
    T, B, width = x.shape
    D, H = options.directions, w_hh.shape[1]
    if w_ih is None:  # x is the projection already
        w_ih = torch.eye(width, dtype=x.dtype, device=x.device)
    bias = None
    if b_ih is not None:
        bias = torch.cat([b_ih.reshape(D, H), b_hh.reshape(D, H)], 1)
    activation = ACTIVATIONS[options.cell]
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (
            x,
            w_ih.reshape(D, H, -1),
            w_hh.reshape(D, H, H),
            bias,
            None if lengths is None else lengths.to(torch.int32),
            h_0,
        ),
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            "activations": [activation] * D,
        },
        dtypes=(x.dtype, x.dtype),
        shapes=((T, D, B, H), (D, B, H)),
        version=OPSET,
    )
    if lengths is not None and h_0 is not None:  # the node puts out 0 for a row without a step
        h_n = torch.where((lengths == 0).unsqueeze(1), h_0, h_n)
    return y.transpose(1, 2).reshape(T, B, D * H), h_n


def refuse_old_exporter() -> None:
    """
    Raises:
        RuntimeError: torch.onnx.export(dynamo=False) is under way.
    """
    if torch._C._get_tracing_state() is not None and is_exporting():
        raise RuntimeError(
            "torch.onnx.export: given dynamo=False, wanted dynamo=True for rnnfast.RNN. "
            "rnnfast.to_torch(model) puts nn.RNN in its place, which both exporters take"
        )


def _check(x: Tensor, gamma: Tensor | None, reset: Tensor | None, options: Options) -> None:
    extras = {
        'norm="layer"': gamma is not None,
        f"num_heads={options.heads}": options.heads > 1,
        "reset": reset is not None,
        str(x.dtype): x.dtype not in DTYPES,
    }
    given = ", ".join(name for name, used in extras.items() if used)
    if given:
        raise RuntimeError(
            f"torch.onnx.export: given rnnfast.RNN with {given}, wanted what ONNX's RNN can "
            "express: a plain recurrence in float32, float64 or float16. (rnnfast.to_torch refuses "
            "it, too.) For a fixed number of time steps, export the program that "
            "run_decompositions makes with rnnfast.decompositions()"
        )
