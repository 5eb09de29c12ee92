"""Budget (i): errors over whole sequences against float64, beside PyTorch's errors.

The peer is the module of torch.nn. Where torch lacks the option, the peer is the eager loop:
PyTorch's operations in the same dtype, which PyTorch differentiates. A result counts with its worst
time step, pooled over several cases with different seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import torch_native
from ..cells import CELLS
from ..testing import StepError, error_ratio, worst_step
from .cases import Case
from .layers import LAYER_RESULTS, PEER, as_layer, exact_layer, inputs_of, peer_name
from .runs import run, run_differentiated

ALLOWED = 1.25  # times the error of the peer
# Values pooled in a step. If the errors are equal, chance gives a ratio of 1 with a standard
# deviation of 1 / sqrt(values). 1.25 is five of these away.
ENOUGH = 400
OVER_TIME = ("y", "dp", "dx")
LOOP_RESULTS = ["y", "h_n", "c_n", "dp", "dw_hh", "dgamma", "dbeta", "db_hh", "dh_0", "dc_0"]

Pairs = Sequence[tuple[Tensor, Tensor]]  # (found, exact) for each seed


class Comparison(NamedTuple):
    """The error of one result, ours beside the peer's."""

    name: str
    ours: StepError
    theirs: StepError
    peer: str
    over_time: bool

    @property
    def ratio(self) -> float:
        return error_ratio(self.ours, self.theirs)

    @property
    def good(self) -> bool:
        return self.ratio <= ALLOWED  # False for NaN

    def to_dict(self) -> dict:
        ours, theirs = self.ours._asdict(), self.theirs._asdict()
        found = {"result": self.name, "ratio": self.ratio, "peer": self.peer}
        return found | {"over_time": self.over_time, "ours": ours, "theirs": theirs}

    def __str__(self) -> str:
        at = f" at t = {self.ours.t}" if self.over_time else ""
        return (
            f"{self.name}: RMS error {self.ours.rms:.3g}{at}, {self.ratio:.3g} times the "
            f"{self.theirs.rms:.3g} of {self.peer}, wanted {ALLOWED} at most"
        )


def compare(name: str, ours: Pairs, theirs: Pairs, peer: str, over_time: bool) -> Comparison:
    return Comparison(
        name, *(worst_step(_in_steps(x, over_time)) for x in (ours, theirs)), peer, over_time
    )


def compare_layers(
    cases: Sequence[Case], backend: str, batch_first: bool = False, device: str = "cpu"
) -> dict[str, Comparison]:
    """Compares cases as layers (:mod:`.layers`) with the module of torch.nn, or with the eager loop
    where torch lacks the nonlinearity."""
    return compare_layer_runs(*layer_runs(cases, backend, batch_first, device))


def compare_layer_runs(runs: list[list[dict]], peer: str) -> dict[str, Comparison]:
    return {
        name: compare(name, *(of(name, r) for r in runs), peer, name in OVER_TIME)
        for name in LAYER_RESULTS
        if name in runs[0][0]
    }


def layer_runs(
    cases: Sequence[Case], backend: str, batch_first: bool, device: str
) -> tuple[list[list[dict]], str]:
    """Pairs (found, exact) of the backend and of its peer for each case, and the peer's name."""
    peer = PEER if cases[0].options.cell in torch_native.KERNELS else "reference"
    runs: list[list[dict]] = [[], []]
    for case in cases:
        D = len(case.w_hh)
        case = case._replace(p=torch.cat([case.p[..., : inputs_of(case)]] * D, -1))
        exact = exact_layer(case)
        for kind, pairs in zip((backend, peer), runs):
            found = as_layer(case, kind, batch_first, device)
            # found - high is exact if they are close, so low is not lost
            pairs.append({n: (found[n].double() - high, low) for n, (high, low) in exact.items()})
    return runs, peer_name(cases[0]) if peer == PEER else "the eager loop"


def compare_loops(
    cases: Sequence[Case], backend: str, device: str = "cpu"
) -> dict[str, Comparison]:
    """Compares the recurrence alone with the eager loop."""
    exact = [run(case.to(torch.float64), "reference") for case in cases]
    ours = [run(case, backend, device) for case in cases]
    theirs = [run_differentiated(case, device) for case in cases]
    found = {}
    for name in LOOP_RESULTS:
        if exact[0].get(name) is None or (cases[0].gamma is None and name in ("dgamma", "dbeta")):
            continue
        pairs = ([(f[name], e[name]) for f, e in zip(x, exact)] for x in (ours, theirs))
        found[name] = compare(name, *pairs, "the eager loop", name in OVER_TIME)
    return found


def judged(
    found: dict[str, Comparison], cases: Sequence[Case], enough: int = ENOUGH
) -> dict[str, Comparison]:
    """The comparisons that say something about the kernel.

    Three kinds are left out. A step with too few values gives a ratio by chance. For gradients of
    ReLU in 16 bits, one unit that rounds to the other side of 0 outweighs all rounding. With one
    unit the gradient of a gated cell is a product over time of gates; a few rows have most of it,
    and most of its error.
    """
    (_, B, _), (D, rows, S) = cases[0].p.shape, cases[0].w_hh.shape  # rows: of all gates
    pooled = dict.fromkeys(found, len(cases) * D * B * cases[0].H)
    pooled |= dict.fromkeys(("dw_hh", "dw_ih"), len(cases) * D * rows * S)
    pooled |= dict.fromkeys(("db_ih", "db_hh", "dgamma", "dbeta"), len(cases) * D * rows)
    names = [name for name in found if pooled[name] >= enough]
    if cases[0].p.dtype.itemsize < 4 and cases[0].nonlinearity == "relu":
        names = ["y", "h_n"]
    if CELLS[cases[0].options.cell].gated and S == 1:
        names = [name for name in names if not name.startswith("d")]
    return {name: found[name] for name in names}


def of(name: str, runs: list[dict]) -> Pairs:
    return [found[name] for found in runs]


def paired(name: str, runs: list[dict], exact: list[dict]) -> Pairs:
    return [(found[name], wanted[name]) for found, wanted in zip(runs, exact)]


def _in_steps(pairs: Pairs, over_time: bool) -> Pairs:
    return pairs if over_time else [(v.unsqueeze(0), e.unsqueeze(0)) for v, e in pairs]
