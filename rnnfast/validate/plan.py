"""The rows of a run: backends, dtypes, and the checks of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from ..backends import BACKENDS, Problem
from .cases import CELLS_OF, cell_name
from .kernels import (
    GROUPS,
    SEQUENCES,
    TOGETHER,
    Arithmetic,
    Shape,
    Where,
    check_curves,
    check_record,
    check_sequences,
    check_steps,
    has_peer,
    in_layers,
)
from .large import check_large
from .modules import check_changes, check_layer, check_layouts
from .rows import Row

ARITHMETICS = {
    a.name: a
    for a in (
        Arithmetic("float32", torch.float32),
        Arithmetic("tf32", torch.float32, tf32=True),
        Arithmetic("float64", torch.float64),
        Arithmetic("bfloat16", torch.bfloat16),
        Arithmetic("float16", torch.float16),
    )
}
LONG, LAYER, LAYOUT, CHANGED, LARGE = (
    "2000 steps",
    "module",
    "layouts",
    "changed weights",
    "over 2^31",
)
BEYOND = {"reset", "bptt_window", "clip_state_grad", "num_heads"}  # options that nn.RNN lacks


# Least units of a head with layer norm, for budget (i). An error grows with 1 / std of S values,
# which exceeds k with a probability of k^-(S - 1). With fewer units its mean square, or that mean's
# variance, is infinite, and the ratio of two such means is chance.
FEWEST = 6


class Size(NamedTuple):
    """The shapes (T, B, units of a head) of a run."""

    plain: Sequence[Shape]
    options: Sequence[Shape]
    plain_sequences: Sequence[Shape]
    option_sequences: Sequence[Shape]
    curves: Shape
    long: Shape = (2000, 3, 17)
    large: bool = False


ODD = list(product([1, 2, 5], [1, 3, 7], [1, 3, 17, 33, 100, 129]))
WIDE = [(2, 7, 650), (3, 1, 650)]
FEW = [(1, 3, 1), (1, 1, 3), (2, 3, 17), (5, 7, 33), (2, 1, 100)]
SIZES = {
    "quick": Size(
        [*FEW, (2, 7, 129), (2, 3, 650)], FEW, [(20, 64, 17)], [(20, 64, 17)], (300, 3, 64)
    ),
    "default": Size(
        [*ODD, *WIDE], [*ODD[::5], *FEW], SEQUENCES, [(50, 7, 33), (20, 3, 100)], (2000, 3, 64)
    ),
    "full": Size([*ODD, *WIDE], [*ODD, *WIDE], SEQUENCES, SEQUENCES, (2000, 3, 64), large=True),
}


class Task(NamedTuple):
    """A row and the function that fills it."""

    row: Row
    where: Where
    parts: Sequence[Callable[[Row, Where], None]]


def refusal(backend: str, arithmetic: Arithmetic, device: str) -> str:
    """Why a backend cannot compute even the plain problem, or ""."""
    return _refused(backend, arithmetic, device, "rnn_tanh", ())


def tasks(
    backend: str, arithmetic: Arithmetic, device: str, size: Size, groups: Sequence[str] | None
) -> Iterator[Task]:
    """The tasks of these groups."""
    own = computes_the_recurrence(backend)
    for row, parts in _rows(own, size, backend, arithmetic):
        if groups is not None and row.group not in groups:
            continue
        extras, known = _extras(row.norm, row.group), CELLS_OF[row.cell]
        why = {f: _refused(backend, arithmetic, device, cell_name(f), extras) for f in known}
        possible = tuple(f for f in known if not why[f])
        row.left_out = "; ".join(dict.fromkeys(filter(None, why.values())))
        where = Where(backend, arithmetic, device, torch.get_num_threads(), possible)
        yield Task(row, where, parts if possible else ())


def computes_the_recurrence(backend: str) -> bool:
    """Whether a backend computes the recurrence alone. Other backends compute whole stacks."""
    return hasattr(BACKENDS[backend], "forward")


def _rows(
    own: bool, size: Size, backend: str, arithmetic: Arithmetic
) -> Iterator[tuple[Row, list[Callable]]]:
    kinds = [(cell, norm) for cell in CELLS_OF for norm in ("none", "layer")]
    kinds = [(cell, norm) for cell, norm in kinds if norm == "none" or (own and cell == "RNN")]

    def row(cell: str, norm: str, group: str) -> Row:
        return Row(backend, arithmetic.name, norm, group, cell)

    for (cell, norm), group in product(kinds, GROUPS):
        found = row(cell, norm, group)
        plain = group == "plain" and norm == "none"
        sequences = size.plain_sequences if plain else size.option_sequences
        if norm == "layer":
            sequences = [shape for shape in sequences if shape[2] >= FEWEST]
        parts = [partial(check_sequences, shapes=sequences)]
        if own:
            shapes = size.plain if group == "plain" else size.options
            parts.insert(0, partial(check_steps, group=group, shapes=shapes))
            parts.append(partial(check_record, shapes=size.option_sequences))
        if own or (in_layers(found) and has_peer(arithmetic, found)):
            yield found, parts
    for cell, norm in kinds:
        parts = [partial(check_steps, group=g, shapes=[size.long]) for g in ("plain", TOGETHER)]
        curves = partial(check_curves, shape=size.curves)
        yield (
            row(cell, norm, LONG),
            [*(parts if own else []), *([curves] if norm == "none" else [])],
        )
    shapes = [shape for shape in size.options if shape[2] > 1]
    yield row("RNN", "none", LAYER), [partial(check_layer, shapes=shapes)]
    for cell in CELLS_OF:
        changes = partial(check_changes, shapes=[(5, 7, 33), (3, 1, 100)])
        yield row(cell, "none", CHANGED), [changes]
        if arithmetic.dtype != torch.float64:  # float64 has nothing more exact to compare with
            yield row(cell, "none", LAYOUT), [check_layouts]
    if own and size.large and arithmetic.dtype == torch.bfloat16:
        for cell in CELLS_OF:
            yield row(cell, "none", LARGE), [check_large]


def _extras(norm: str, group: str) -> tuple[str, ...]:
    names = BEYOND if group in (TOGETHER, LONG) else BEYOND & {group}
    return (*(["norm"] if norm == "layer" else []), *sorted(names))


def _refused(
    backend: str, arithmetic: Arithmetic, device: str, cell: str, extras: tuple[str, ...]
) -> str:
    projected = computes_the_recurrence(backend)
    extras = extras if projected else ()
    problem = Problem(device, arithmetic.dtype, cell, projected=projected, extras=extras)
    return BACKENDS[backend].unavailable(problem)


GROUP_NAMES = [*GROUPS, LONG, LAYER, CHANGED, LAYOUT, LARGE]
