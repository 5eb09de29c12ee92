"""The options of the modules, one by one. The tests run each of them and pairs of them; README's
table says which backend computes which."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

import rnnfast
from rnnfast.backends import BACKENDS, cuda, triton, unavailable

KINDS = {"RNN": rnnfast.RNN, "LSTM": rnnfast.LSTM, "GRU": rnnfast.GRU}


class Feature(NamedTuple):
    """One option."""

    name: str  # as the table has it
    options: Mapping[str, object] = MappingProxyType({})  # of the constructor
    kinds: tuple[str, ...] = tuple(KINDS)
    call: str = ""  # how the module is called: lengths, reset, packed, unbatched, state or nothing
    ours: bool = True  # the native CPU kernels compute it


FEATURES = (
    Feature("`bias=False`", {"bias": False}),
    Feature("`num_layers`", {"num_layers": 3}),
    Feature("`batch_first`", {"batch_first": True}),
    Feature("`dropout`", {"num_layers": 2, "dropout": 0.5}),
    Feature("`bidirectional`", {"bidirectional": True}),
    Feature("`hx`", call="state"),
    Feature("unbatched input", call="unbatched"),
    Feature("PackedSequence", call="packed"),
    Feature("`lengths`", call="lengths"),
    Feature("`init`", {"init": "orthogonal"}),
    Feature("`init`", {"init": "glorot"}),
    Feature('`init="identity"`', {"init": "identity"}, ("RNN",)),
    Feature('`init="he"`', {"init": "he"}, ("RNN",)),
    Feature('`nonlinearity="relu"`', {"nonlinearity": "relu"}, ("RNN",)),
    Feature("`forget_bias`", {"forget_bias": 1.0}, ("LSTM",)),
    Feature("`chrono_steps`", {"chrono_steps": 9}, ("LSTM", "GRU")),
    Feature("`reset`", call="reset"),
    Feature("`num_heads`", {"num_heads": 2}),
    Feature("`num_heads`", {"num_heads": 8}),
    Feature("`residual`", {"num_layers": 3, "residual": True}),
    Feature("`bptt_window`", {"bptt_window": 3}),
    Feature("`clip_state_grad`", {"clip_state_grad": 0.1}),
    Feature("`track_gradient_flow`", {"track_gradient_flow": True}),
    Feature("`track_gradient_flow`", {"track_gradient_flow": "sample"}),
    Feature('`norm="layer"`', {"norm": "layer"}, ("RNN",)),
    Feature('`norm="batch"`', {"norm": "batch"}, ("RNN",)),
    Feature('`nonlinearity="sigmoid"`', {"nonlinearity": "sigmoid"}, ("RNN",)),
    Feature("`return_cell_states`", {"return_cell_states": True}, ("LSTM",)),
    Feature("`proj_size`", {"proj_size": 3}, ("LSTM",), ours=False),
)
EXCLUDE = [{"forget_bias", "chrono_steps"}, {"forget_bias", "bias"}, {"chrono_steps", "bias"}]


def go_together(a: Feature, b: Feature) -> bool:
    """Whether a module can have both options, in one call."""
    shared = a.options.keys() & b.options.keys()
    clash = any(a.options[name] != b.options[name] for name in shared)
    given = a.options.keys() | b.options.keys()
    # A layer norm over one unit is always 0.
    alone = {"norm": "layer", "num_heads": 8}.items() <= {**a.options, **b.options}.items()
    ways = {a.call, b.call} - {""}
    return not (clash or alone or any(pair <= given for pair in EXCLUDE) or len(ways) > 1)


def make(kind: str, *features: Feature, backend: str, size: int = 8, **more) -> nn.RNNBase:
    options = {name: value for feature in features for name, value in feature.options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # residual where no layer has a twin in width
        return KINDS[kind](size, size, backend=backend, **options, **more)


def computes(backend: str, kind: str, feature: Feature) -> bool:
    """Whether a backend has this feature, on a machine that it runs on."""
    if kind not in feature.kinds:
        return False
    module = make(kind, feature, backend="auto", device="meta")
    reset = torch.ones(1, 1, dtype=torch.bool) if feature.call == "reset" else None
    problem = module._problem(torch.empty(1, 1, 8), reset)
    kernels = {"cuda": cuda, "triton": triton}
    if backend in kernels and not problem.projects_h:  # what they lack depends on the cell alone
        return problem.cell in kernels[backend].KERNELS_OF
    return not unavailable(backend, problem)


def table() -> Iterator[str]:
    """The lines of README's table. Features of the same backends share a row. One that not every
    module has names its modules."""
    rows: list[tuple[dict[str, str], list[str]]] = []
    for feature in sorted(FEATURES, key=lambda feature: -len(feature.kinds)):
        found = {
            kind: ", ".join(f"`{name}`" for name in BACKENDS if computes(name, kind, feature))
            for kind in feature.kinds
        }
        alike = [names for row, names in rows if found.items() <= row.items()]
        if not alike:
            rows.append((found, []))
        names = alike[0] if alike else rows[-1][1]
        some = f" ({', '.join(feature.kinds)})" if len(found) < len(KINDS) else ""
        if feature.name + some not in names:
            names.append(feature.name + some)
    yield f"| feature | {' | '.join(KINDS)} |"
    yield "|---" * (1 + len(KINDS)) + "|"
    for found, names in rows:
        yield f"| {', '.join(names)} | {' | '.join(found.get(kind, '-') for kind in KINDS)} |"
