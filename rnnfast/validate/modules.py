"""Checks rnnfast.RNN around a backend: projection, biases, layouts, and changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..modules import RNN
from ..recurrence.groups import Results, Saved, States, Weights
from ..recurrence.loop import RecurrenceGradients
from ..testing import Verdict, judge_backward, judge_forward, judge_sum
from .cases import Case, make_case
from .kernels import SEEDS, Shape, Where
from .layers import PEER, layer_bias, layer_weights, make_layer, set_weights, through_layer
from .rows import Row
from .sequences import ENOUGH, compare

T, B, FEATURES, H = 12, 7, 9, 96  # sizes for the layouts
LENGTHS = torch.tensor([T, 1, 5, T, 8, 3, 11])  # lengths of the packed rows
EXACT = "nn.RNN in float64"


def judge_layer(case: Case, found: dict[str, Tensor], **options) -> list[Verdict]:
    """Budget (ii) for one plain layer with one direction, where dx = dp."""
    p = case.p.double() + layer_bias(case)
    # A kernel may store the projection in 16 bits.
    of_p = torch.finfo(case.p.dtype).eps / 2 * p.abs() if case.p.dtype.itemsize < 4 else None
    case, dx = case._replace(lengths=None, reset=None, gamma=None, beta=None), found["dx"]
    results = Results(found["y"], States(found["h_n"]), Saved())
    weights = Weights(None, None, None, found["dw_hh"])
    gradients = RecurrenceGradients(dx, weights, States(found["dh_0"]))
    inputs = p, case.weights, case.states, case.rows, case.options
    kept = case.kept(results.y, results.saved)
    backward = judge_backward(case.given, kept, case.options, gradients, **options)
    return [
        *judge_forward(*inputs, results, of_p=of_p, **options),
        *(v._replace(name="dx") if v.name == "dp" else v for v in backward),
        judge_sum("dw_ih", found["dw_ih"][0], dx, case.p, **options),
        *(judge_sum(name, found[name][0], dx, **options) for name in ("db_ih", "db_hh")),
    ]


def _plain_cases(where: Where, shapes: list[Shape]) -> Iterator[tuple[str, Case]]:
    for seed, shape in enumerate(shapes):
        for f in where.nonlinearities:
            words = "{}, T = {}, B = {}, H = {}".format(f, *shape)
            yield words, make_case(*shape, 1, where.arithmetic.dtype, f, seed)


def check_layer(row: Row, where: Where, shapes: list[Shape]) -> None:
    """Budget (ii), and the bits of two runs."""
    u = where.arithmetic.rounding(where.backend)
    for words, case in _plain_cases(where, shapes):
        row.begin(words)
        rnn = make_layer(case, where.backend, device=where.device)
        runs = [through_layer(rnn, case) for _ in range(2)]
        row.same_bits(runs)
        row.take_steps(judge_layer(case, runs[0], **u))


# ------------------------------------------------------------------------- changed weights


@torch.no_grad()
def _by_data(rnn: nn.RNNBase, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        getattr(rnn, name).data = value.to(getattr(rnn, name).device)


def _by_parameter(rnn: nn.RNNBase, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        setattr(rnn, name, nn.Parameter(value.to(getattr(rnn, name).device, copy=True)))


CHANGES: dict[str, Callable] = {
    "in place": set_weights,
    "through .data": _by_data,
    "by new parameters": _by_parameter,
}


def check_changes(row: Row, where: Where, shapes: list[Shape]) -> None:
    """Budget (ii): a second call uses the weights that changed in between."""
    u = where.arithmetic.rounding(where.backend)
    for words, case in _plain_cases(where, shapes):
        weights = layer_weights(case)
        for how, change in CHANGES.items():
            row.begin(f"{words}, weights changed {how}")
            rnn = make_layer(case, where.backend, device=where.device)
            set_weights(rnn, {name: -0.5 * x for name, x in weights.items()})
            through_layer(rnn, case)
            change(rnn, weights)
            row.take_steps(judge_layer(case, through_layer(rnn, case), **u))


# ------------------------------------------------------------------------------------- layouts

LAYOUTS: dict[str, dict] = {
    "three layers": {"num_layers": 3},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "unbatched": {},
    "packed": {"bidirectional": True},
    "without bias": {"bias": False},
}


def check_layouts(row: Row, where: Where) -> None:
    """Budget (i) for whole modules beside nn.RNN. nn.RNN in float64 gives the exact results."""
    for f, layout in product(("tanh", "relu"), LAYOUTS):
        row.begin(f"{f}, {layout}, T = {T}, B = {B}, I = {FEATURES}, H = {H}")
        ours, theirs, exact = (
            [_through(_module(kind, layout, f, seed, where), layout, seed, where) for seed in SEEDS]
            for kind in (where.backend, PEER, EXACT)
        )
        names = list(exact[0])
        if f == "relu" and where.arithmetic.dtype.itemsize < 4:
            names = ["y", "h_n"]  # as in sequences.judged
        found = []
        for name in names:
            over_time = name in ("y", "dx")
            values = exact[0][name].numel() * len(SEEDS) // (T if over_time else 1)
            if values >= ENOUGH:
                pairs = ([(a[name], e[name]) for a, e in zip(r, exact)] for r in (ours, theirs))
                found.append(compare(name, *pairs, "nn.RNN", over_time))
        row.take_sequences(found)


def _module(kind: str, layout: str, f: str, seed: int, where: Where) -> nn.RNNBase:
    """A contracting module of this kind. Every kind has the same weights."""
    options = LAYOUTS[layout] | {"nonlinearity": f}
    options |= {"dtype": where.arithmetic.dtype, "device": where.device}
    if kind == EXACT:
        options |= {"dtype": torch.float64, "device": "cpu"}
    if kind in (PEER, EXACT):
        rnn = nn.RNN(FEATURES, H, **options)
    else:
        rnn = RNN(FEATURES, H, backend=kind, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in rnn.named_parameters():
        value = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.startswith("weight_hh"):
            value *= 0.95 / torch.linalg.matrix_norm(value, 2)
        else:
            value /= math.sqrt(weight.shape[-1])
        set_weights(rnn, {name: value.to(where.arithmetic.dtype)})
    return rnn


def _through(rnn: nn.RNNBase, layout: str, seed: int, where: Where) -> dict[str, Tensor]:
    """{name: result or gradient} on the CPU. Tensors over time are [T, B, features]."""
    weights = dict(rnn.named_parameters())
    states, D = rnn.num_layers * (1 + rnn.bidirectional), 1 + rnn.bidirectional
    shapes = [(T, B, FEATURES), (states, B, H), (T, B, D * H), (states, B, H)]
    generator = torch.Generator().manual_seed(100 + seed)
    drawn = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = [v.to(where.arithmetic.dtype).to(rnn.weight_hh_l0) for v in drawn]
    x, hx, grad_y, grad_h_n = (v[:, 0] for v in inputs) if layout == "unbatched" else inputs
    leaves = x.requires_grad_(), hx.requires_grad_(), *weights.values()
    if layout == "packed":
        y, h_n = rnn(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
        y, _ = pad_packed_sequence(y)
    elif rnn.batch_first:
        y, h_n = rnn(x.transpose(0, 1), hx)
        y = y.transpose(0, 1)
    else:
        y, h_n = rnn(x, hx)
    gradients = torch.autograd.grad((y, h_n), leaves, (grad_y, grad_h_n))
    short = (name.replace("weight", "dw").replace("bias", "db") for name in weights)
    names = ("y", "h_n", "dx", "dh_0", *short)
    values = (y.detach(), h_n.detach(), *gradients)
    return {name: v.cpu() for name, v in zip(names, values)}
