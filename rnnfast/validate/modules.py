"""Checks the modules around a backend: projection, biases, layouts, and changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..cells import CELLS
from ..modules import GRU, LSTM, RNN
from ..recurrence.groups import Results, Saved, States, Weights
from ..recurrence.loop import RecurrenceGradients
from ..testing import Verdict, judge_backward, judge_forward, judge_sum
from .cases import Case, cell_name, make_case
from .kernels import SEEDS, Shape, Where
from .layers import PEER, layer_bias, make_layer, set_weights, through_layer
from .rows import Row
from .sequences import ENOUGH, compare, paired

MODULES = {"RNN": (RNN, nn.RNN), "LSTM": (LSTM, nn.LSTM), "GRU": (GRU, nn.GRU)}  # ours, torch's
EXACT = "torch's module in float64"


class Sizes(NamedTuple):
    """Of a module and its input."""

    T: int
    B: int
    features: int
    H: int


OF_LAYOUTS = Sizes(12, 7, 9, 96)
LENGTHS = torch.tensor([12, 1, 5, 12, 8, 3, 11])  # of the packed rows


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
        for f in where.cells:
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
    """The bits: after a change of the weights, a second call computes what a fresh module does."""
    for seed, (T, B, H) in enumerate(shapes):
        for f, (how, change) in product(where.cells, CHANGES.items()):
            row.begin(f"{f}, T = {T}, B = {B}, H = {H}, weights changed {how}")
            layer = Modules(row.cell, f, where, Sizes(T, B, H, H))
            fresh, rnn = (layer.make(where.backend, seed) for _ in range(2))
            weights = {name: x.detach().clone() for name, x in rnn.named_parameters()}
            wanted = layer.through(fresh, seed)
            set_weights(rnn, {name: -0.5 * x for name, x in weights.items()})
            layer.through(rnn, seed)
            change(rnn, weights)
            row.same_bits([wanted, layer.through(rnn, seed)])


# ------------------------------------------------------------------------------------- layouts

LAYOUTS: dict[str, dict] = {
    "three layers": {"num_layers": 3},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "unbatched": {"unbatched": True},
    "packed": {"bidirectional": True, "packed": True},
    "without bias": {"bias": False},
}
OF_INPUT = ("unbatched", "packed")  # no arguments of a module


def check_layouts(row: Row, where: Where) -> None:
    """Budget (i) for whole modules beside torch's. Torch's module in float64 is exact."""
    names, sizes = ("tanh", "relu") if row.cell == "RNN" else where.cells, OF_LAYOUTS
    for f, (words, layout) in product(names, LAYOUTS.items()):
        row.begin(f"{f}, {words}, (T, B, I, H) = {tuple(sizes)}")
        modules = Modules(row.cell, f, where, sizes, layout)
        ours, theirs, exact = (modules.runs(kind) for kind in (where.backend, PEER, EXACT))
        compared = list(exact[0])
        if f == "relu" and where.arithmetic.dtype.itemsize < 4:
            compared = ["y", "h_n"]  # as in sequences.judged
        found = []
        for name in compared:
            over_time = name in ("y", "dx")
            values = exact[0][name].numel() * len(SEEDS) // (sizes.T if over_time else 1)
            if values >= ENOUGH:
                pairs = (paired(name, r, exact) for r in (ours, theirs))
                found.append(compare(name, *pairs, f"nn.{row.cell}", over_time))
        row.take_sequences(found)


class Modules(NamedTuple):
    """Modules of several kinds, with the same weights and inputs. A kind is a backend of ours, or
    PEER or EXACT."""

    cell: str  # "RNN", "LSTM" or "GRU"
    nonlinearity: str
    where: Where
    sizes: Sizes
    layout: Mapping[str, object] = MappingProxyType({})

    def runs(self, kind: str) -> list[dict[str, Tensor]]:
        """Results and gradients for each seed."""
        return [self.through(self.make(kind, seed), seed) for seed in SEEDS]

    def make(self, kind: str, seed: int) -> nn.RNNBase:
        """A contracting module."""
        dtype, H = self.where.arithmetic.dtype, self.sizes.H
        options = {name: value for name, value in self.layout.items() if name not in OF_INPUT}
        options |= {"dtype": dtype, "device": self.where.device}
        options |= {"nonlinearity": self.nonlinearity} if self.cell == "RNN" else {}
        if kind == EXACT:
            options |= {"dtype": torch.float64, "device": "cpu"}
        ours, theirs = MODULES[self.cell]
        if kind in (PEER, EXACT):
            rnn = theirs(self.sizes.features, H, **options)
        else:
            rnn = ours(self.sizes.features, H, backend=kind, **options)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in rnn.named_parameters():
            value = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if name.startswith("weight_hh"):
                gates = value.view(-1, H, H)
                gates *= 0.95 / torch.linalg.matrix_norm(gates, 2)[:, None, None]
            else:
                value /= math.sqrt(weight.shape[-1])
            set_weights(rnn, {name: value.to(dtype)})
        return rnn

    def through(self, rnn: nn.RNNBase, seed: int) -> dict[str, Tensor]:
        """{name: result or gradient} on the CPU. Tensors over time are [T, B, features]."""
        T, B, features, H = self.sizes
        weights = dict(rnn.named_parameters())
        D, names = 1 + rnn.bidirectional, CELLS[cell_name(self.nonlinearity)].states
        state = rnn.num_layers * D, B, H
        shapes = [(T, B, features), (T, B, D * H), *[state] * (2 * len(names))]
        generator = torch.Generator().manual_seed(100 + seed)
        drawn = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
        inputs = [v.to(self.where.arithmetic.dtype).to(rnn.weight_hh_l0) for v in drawn]
        if "unbatched" in self.layout:
            inputs = [v[:, 0] for v in inputs]
        x, grad_y, *states = inputs
        first, of_last = states[: len(names)], states[len(names) :]
        leaves = x.requires_grad_(), *(s.requires_grad_() for s in first), *weights.values()
        hx = first[0] if len(names) == 1 else tuple(first)
        if "packed" in self.layout:
            y, last = rnn(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
            y, _ = pad_packed_sequence(y)
        elif rnn.batch_first:
            y, last = rnn(x.transpose(0, 1), hx)
            y = y.transpose(0, 1)
        else:
            y, last = rnn(x, hx)
        last = (last,) if len(names) == 1 else last
        gradients = torch.autograd.grad((y, *last), leaves, (grad_y, *of_last))
        short = (name.replace("weight", "dw").replace("bias", "db") for name in weights)
        called = ("y", *(f"{n}_n" for n in names), "dx", *(f"d{n}_0" for n in names), *short)
        values = (y.detach(), *(s.detach() for s in last), *gradients)
        return {name: v.cpu() for name, v in zip(called, values)}
