"""Runs a case as one layer of a module of torch.nn or rnnfast with W_ih = I, so that the
projection and the biases are included. The layer has one input feature for each unit of a gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..cells import CELLS
from ..modules import GRU, LSTM, RNN
from .cases import Case
from .long_double import in_long_double

LAYER_RESULTS = ["y", "h_n", "dx", "dw_hh", "dh_0", "dw_ih", "db_ih", "db_hh", "c_n", "dc_0"]
PEER = "torch.nn"  # a kind of layer, beside the backends of rnnfast
CLASSES = {"lstm": (nn.LSTM, LSTM), "gru": (nn.GRU, GRU)}


def peer_name(case: Case) -> str:
    """The module of torch.nn that computes the case."""
    return f"nn.{CLASSES.get(case.options.cell, (nn.RNN,))[0].__name__}"


def inputs_of(case: Case) -> int:
    """The input features of the layer."""
    return case.w_hh.shape[1]


def layer_bias(case: Case) -> Tensor:
    """[D * H] in eighths, which every dtype represents exactly."""
    return torch.arange(case.p.shape[2]).remainder(7).sub(3).to(case.p.dtype) / 8


def layer_weights(case: Case) -> dict[str, Tensor]:
    """{name in the module: weight}. b_ih has the whole bias, so p = x + b_ih is one sum; b_hh has
    what the recurrence itself adds."""
    D, rows, _ = case.w_hh.shape
    b_hh = torch.zeros(D * rows, dtype=case.p.dtype) if case.b_hh is None else case.b_hh
    values = {
        "weight_hh_l0": case.w_hh,
        "weight_ih_l0": torch.eye(rows, dtype=case.p.dtype).expand(D, rows, rows),
        "bias_ih_l0": layer_bias(case).view(D, rows),
        "bias_hh_l0": b_hh.view(D, rows),
    }
    suffixes = ["", "_reverse"][:D]
    return {n + s: x[d] for n, x in values.items() for d, s in enumerate(suffixes)}


def make_layer(
    case: Case, kind: str, batch_first: bool = False, device: str = "cpu", **options
) -> nn.RNNBase:
    """A layer of this kind: PEER, or a backend of rnnfast."""
    D = len(case.w_hh)
    options |= {"bidirectional": D == 2, "batch_first": batch_first, "dtype": case.p.dtype}
    options["device"] = device
    theirs, ours = CLASSES.get(case.options.cell, (nn.RNN, RNN))
    if not CELLS[case.options.cell].gated:
        options["nonlinearity"] = case.nonlinearity
    sizes = inputs_of(case), case.H
    rnn = theirs(*sizes, **options) if kind == PEER else ours(*sizes, backend=kind, **options)
    set_weights(rnn, layer_weights(case))
    return rnn


@torch.no_grad()
def set_weights(rnn: nn.RNNBase, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        getattr(rnn, name).copy_(value)


def through_layer(rnn: nn.RNNBase, case: Case) -> dict[str, Tensor]:
    """LAYER_RESULTS (results and gradients) on the CPU, without c where the cell has none. dx is
    the sum of dp over directions."""
    case = case.on(next(rnn.parameters()).device)
    D = len(case.w_hh)
    rnn.zero_grad()

    def swap(v: Tensor) -> Tensor:
        return v.transpose(0, 1) if rnn.batch_first else v

    x = swap(case.p[..., : inputs_of(case)]).detach().requires_grad_()
    starts = [s.detach().requires_grad_() for s in case.states if s is not None]
    hx = starts[0] if len(starts) == 1 else tuple(starts)
    if case.lengths is None:
        y, last = rnn(x, hx)
    elif isinstance(rnn, (nn.RNN, nn.LSTM, nn.GRU)):
        lengths = case.lengths.cpu()
        packed = pack_padded_sequence(x, lengths, rnn.batch_first, enforce_sorted=False)
        y, last = rnn(packed, hx)
        y, _ = pad_packed_sequence(y, rnn.batch_first)
    else:
        y, last = rnn(x, hx, lengths=case.lengths)
    last = last if isinstance(last, tuple) else (last,)
    given = (case.grad_h_n, case.grad_c_n)[: len(last)]
    torch.autograd.backward([y, *last], [swap(case.grad_y), *given])
    names = {"weight_hh_l0": "dw_hh", "weight_ih_l0": "dw_ih"}
    names |= {"bias_ih_l0": "db_ih", "bias_hh_l0": "db_hh"}
    found = {
        own: torch.stack([getattr(rnn, name + s).grad for s in ["", "_reverse"][:D]])
        for name, own in names.items()
    }
    found |= {"y": swap(y.detach()), "dx": swap(x.grad)}
    for state, end, start in zip("hc", last, starts):
        found |= {f"{state}_n": end.detach(), f"d{state}_0": start.grad}
    return {name: found[name].cpu() for name in LAYER_RESULTS if name in found}


def as_layer(
    case: Case, kind: str, batch_first: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    return through_layer(make_layer(case, kind, batch_first, device), case)


def exact_layer(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact results of the layer as high + low. float64 needs long double and no lengths."""
    if case.p.dtype == torch.float64:
        return in_long_double(case, layer_bias(case))
    found = as_layer(case.to(torch.float64), "reference")
    return {name: (v, torch.zeros_like(v)) for name, v in found.items()}
