"""Checks the recurrence of a backend from the input projection on, with every option."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence import loop
from ..recurrence.groups import Saved
from ..recurrence.record import FIELDS
from ..testing import step_errors
from .cases import NONLINEARITIES, Case, make_case
from .long_double import AVAILABLE
from .rows import Row
from .runs import judge, own_rounding, run, threads
from .sequences import compare_layer_runs, compare_layers, compare_loops, judged, layer_runs, of

SEEDS = range(5)
Shape = tuple[int, int, int]  # T, B, and the units of a head
SEQUENCES: list[Shape] = [  # for budget (i)
    (20, 64, 1),
    (20, 64, 3),
    (20, 64, 17),
    (50, 7, 33),
    (20, 3, 100),
    (20, 3, 129),
    (10, 8, 512),
]

# Arguments of make_case by the units of a head. The clip changes about half of the steps.
GROUPS: dict[str, Callable[[int], dict]] = {
    "plain": lambda S: {},
    "lengths": lambda S: {"lengths": True},
    "reset": lambda S: {"reset": True},
    "bptt_window": lambda S: {"bptt_window": 2},
    "clip_state_grad": lambda S: {"clip_state_grad": math.sqrt(1.1 * S)},
    "num_heads": lambda S: {"heads": 3},
    "both directions": lambda S: {"D": 2},
}
TOGETHER = "all together"
GROUPS[TOGETHER] = lambda S: {k: v for of in list(GROUPS.values())[:-1] for k, v in of(S).items()}
OF_TORCH = ("plain", "lengths", "both directions")  # without norm, nn.RNN also computes these

RECORD_ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}


class Arithmetic(NamedTuple):
    """A dtype and the rounding of its products."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    def rounding(self, backend: str) -> dict[str, float]:
        """The unit roundoff for the judge."""
        return {"u_operand": 2.0**-11} if self.tf32 else own_rounding(backend, self.dtype)


class Where(NamedTuple):
    """Where a row runs: backend, arithmetic, device, threads."""

    backend: str
    arithmetic: Arithmetic
    device: str
    threads: int  # available; most rows use one, because the operations are small
    cells: tuple[str, ...] = tuple(NONLINEARITIES)  # of the row, as make_case takes them


def cases(where: Where, norm: str, group: str, shape: Shape, seed: int) -> Iterator:
    """(words, case) for every cell of the row."""
    T, B, S = shape
    options = GROUPS[group](S) | {"norm": norm == "layer", "dtype": where.arithmetic.dtype}
    if options["norm"] and S == 1:  # layer norm of one value is always 0
        return
    H = S * options.get("heads", 1)
    for f in where.cells:
        case = make_case(T, B, H, nonlinearity=f, seed=seed, **options)
        yield f"{f}, T = {T}, B = {B}, H = {H}", case


def check_steps(row: Row, where: Where, group: str, shapes: Sequence[Shape]) -> None:
    """Budget (ii), the record, and the bits of two runs. One thread computes, all with a record."""
    u = where.arithmetic.rounding(where.backend)
    for seed, shape in enumerate(shapes):
        for words, case in cases(where, row.norm, group, shape, seed):
            row.begin(words)
            apart = case.with_options(per_sample=True)
            plain = [run(case, where.backend, where.device) for _ in range(2)]
            with threads(where.threads):
                recorded = [run(apart, where.backend, where.device, True) for _ in range(2)]
            row.same_bits(plain)
            row.same_bits(recorded)
            row.take_steps(judge(apart, recorded[0], **u))
            # Without a record another kernel may run.
            if any(x is not None and not x.equal(recorded[0][n]) for n, x in plain[0].items()):
                row.take_steps(judge(case, plain[0], **u))


def check_sequences(row: Row, where: Where, shapes: Sequence[Shape]) -> None:
    """Budget (i), beside the module of torch.nn if it can compute the case, beside the eager loop
    otherwise."""
    if where.backend == "reference" or not has_peer(where.arithmetic, row):
        return
    compare = compare_layers if in_layers(row) else compare_loops
    for shape in shapes:
        for runs in zip(*(cases(where, row.norm, row.group, shape, seed) for seed in SEEDS)):
            found = [_for_torch(case) if in_layers(row) else case for _, case in runs]
            row.begin(runs[0][0])
            comparisons = compare(found, where.backend, device=where.device)
            row.take_sequences(judged(comparisons, found).values())


def in_layers(row: Row) -> bool:
    """Whether torch's module computes the row, so that whole layers are compared."""
    return row.norm == "none" and row.group in OF_TORCH


def has_peer(arithmetic: Arithmetic, row: Row) -> bool:
    """Whether there are a more exact computation and a peer that stores what a kernel stores.
    Budget (ii) judges every step without either."""
    if arithmetic.dtype == torch.float64:  # long double has the plain layer
        return AVAILABLE and row.norm == "none" and row.group in ("plain", "both directions")
    # In 16 bits kernels store gates; the eager loop keeps them in float32.
    return row.cell == "RNN" or in_layers(row) or arithmetic.dtype.itemsize == 4


def check_record(row: Row, where: Where, shapes: Sequence[Shape]) -> None:
    """The record over whole sequences, in float32 and float64. In 16 bits every step rounds da
    to a few digits, and earlier steps inherit the error; there check_steps judges each step."""
    allowed = RECORD_ERROR.get(where.arithmetic.dtype)
    if where.backend == "reference" or allowed is None or where.arithmetic.tf32:
        return
    for shape in shapes:
        for words, case in cases(where, row.norm, row.group, shape, 0):
            row.begin(words)
            error, name = record_error(case, where)
            row.take_record_error(error, name, allowed)


def check_curves(row: Row, where: Where, shape: Shape) -> None:
    """Budget (i): the errors of a long sequence, step by step."""
    T, B, H = shape
    if where.backend == "reference" or (where.arithmetic.dtype == torch.float64 and not AVAILABLE):
        return
    name = where.cells[0]
    row.begin(f"{name}, T = {T}, B = {B}, H = {H}")
    options = {"dtype": where.arithmetic.dtype, "nonlinearity": name}
    found = [make_case(T, B, H, seed=seed, **options) for seed in SEEDS]
    runs, peer = layer_runs(found, where.backend, False, where.device)
    row.take_sequences(judged(compare_layer_runs(runs, peer), found).values())
    row.curves = {
        name: {who: _digits(step_errors(of(name, r))) for who, r in zip(("ours", "theirs"), runs)}
        for name in ("y", "dx")
    }


def _digits(x: Tensor) -> list[float]:
    """Rounds to the digits that a reader needs."""
    return [float(f"{value:.3g}") for value in x.tolist()]


def _for_torch(case: Case) -> Case:
    """torch's module takes packed rows: no length is 0, and one is T."""
    if case.lengths is None:
        return case
    lengths = case.lengths.clamp(min=1)
    lengths[len(lengths) // 2] = len(case.p)
    return case._replace(lengths=lengths)


def record_error(case: Case, where: Where) -> tuple[float, str]:
    """The largest relative error of the record over all steps, and its field.

    The expected record is the float64 formula applied to the kernel's own y, so that a ReLU unit is
    on the same side of 0 in both.
    """
    found = run(case, where.backend, where.device, recorded=True)
    wanted = _exact_record(case, found)
    errors = {}
    for name, a, w in zip(FIELDS, found["record"].unbind(-1), wanted.unbind(-1)):
        if name.endswith("squares"):
            name, a, w = name.replace("squares", "norm"), a.sqrt(), w.sqrt()
        error = torch.where(a == w, 0, (a - w).abs() / w.abs())
        errors[name] = error.nan_to_num(math.inf).max().item()
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def _exact_record(case: Case, found: dict[str, Tensor | None]) -> Tensor:
    case = case.to(torch.float64)
    saved = (found.get(name) for name in ("cell_values", "ahat", "rstd"))
    saved = (v if v is None else v.double() for v in saved)
    wanted = torch.empty_like(found["record"])
    kept = case.kept(found["y"].double(), Saved(*saved))
    loop.backward(case.given, kept, case.options, wanted)
    return wanted
