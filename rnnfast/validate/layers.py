"""Runs a case as one layer of nn.RNN or rnnfast.RNN with W_ih = I, so that the projection and the
biases are included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..modules import RNN
from .cases import Case
from .long_double import in_long_double

LAYER_RESULTS = ["y", "h_n", "dx", "dw_hh", "dh_0", "dw_ih", "db_ih", "db_hh"]
PEER = "nn.RNN"  # a kind of layer, beside the backends of rnnfast.RNN


def layer_bias(case: Case) -> Tensor:
    """[D * H] in eighths, which every dtype represents exactly."""
    return torch.arange(case.p.shape[2]).remainder(7).sub(3).to(case.p.dtype) / 8


def layer_weights(case: Case) -> dict[str, Tensor]:
    """{name in the module: weight}. b_ih has the whole bias, so p = x + b_ih is one sum."""
    D, H, _ = case.w_hh.shape
    values = {
        "weight_hh_l0": case.w_hh,
        "weight_ih_l0": torch.eye(H, dtype=case.p.dtype).expand(D, H, H),
        "bias_ih_l0": layer_bias(case).view(D, H),
        "bias_hh_l0": torch.zeros(D, H, dtype=case.p.dtype),
    }
    suffixes = ["", "_reverse"][:D]
    return {n + s: x[d] for n, x in values.items() for d, s in enumerate(suffixes)}


def make_layer(
    case: Case, kind: str, batch_first: bool = False, device: str = "cpu", **options
) -> nn.RNNBase:
    """A layer of this kind: PEER, or a backend of rnnfast.RNN."""
    D, H, _ = case.w_hh.shape
    options |= {"bidirectional": D == 2, "batch_first": batch_first, "dtype": case.p.dtype}
    options |= {"nonlinearity": case.nonlinearity, "device": device}
    rnn = nn.RNN(H, H, **options) if kind == PEER else RNN(H, H, backend=kind, **options)
    set_weights(rnn, layer_weights(case))
    return rnn


@torch.no_grad()
def set_weights(rnn: nn.RNNBase, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        getattr(rnn, name).copy_(value)


def through_layer(rnn: nn.RNNBase, case: Case) -> dict[str, Tensor]:
    """LAYER_RESULTS (results and gradients) on the CPU. dx is the sum of dp over directions."""
    case = case.on(next(rnn.parameters()).device)
    D, H, _ = case.w_hh.shape
    rnn.zero_grad()

    def swap(v: Tensor) -> Tensor:
        return v.transpose(0, 1) if rnn.batch_first else v

    x = swap(case.p[..., :H]).detach().requires_grad_()
    h_0 = case.h_0.detach().requires_grad_()
    if case.lengths is None:
        y, h_n = rnn(x, h_0)
    elif isinstance(rnn, nn.RNN):
        lengths = case.lengths.cpu()
        packed = pack_padded_sequence(x, lengths, rnn.batch_first, enforce_sorted=False)
        y, h_n = rnn(packed, h_0)
        y, _ = pad_packed_sequence(y, rnn.batch_first)
    else:
        y, h_n = rnn(x, h_0, lengths=case.lengths)
    torch.autograd.backward([y, h_n], [swap(case.grad_y), case.grad_h_n])
    names = ("weight_hh_l0", "weight_ih_l0", "bias_ih_l0", "bias_hh_l0")
    dw_hh, dw_ih, db_ih, db_hh = (
        torch.stack([getattr(rnn, name + s).grad for s in ["", "_reverse"][:D]]) for name in names
    )
    y, dx = swap(y.detach()), swap(x.grad)
    values = (y, h_n.detach(), dx, dw_hh, h_0.grad, dw_ih, db_ih, db_hh)
    return {name: value.cpu() for name, value in zip(LAYER_RESULTS, values)}


def as_layer(
    case: Case, kind: str, batch_first: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    return through_layer(make_layer(case, kind, batch_first, device), case)


def exact_layer(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact results of the layer as high + low. float64 needs long double and no lengths."""
    if case.p.dtype == torch.float64:
        return dict(zip(LAYER_RESULTS, in_long_double(case, layer_bias(case))))
    found = as_layer(case.to(torch.float64), "reference")
    return {name: (v, torch.zeros_like(v)) for name, v in found.items()}
