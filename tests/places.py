"""The places where the judge sits: a backend, where it computes, and what it is asked there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from cases import FLOATS, NONLINEARITIES, Case, examples, make_case, needs_cpu, own_rounding
from hypothesis import strategies as st

from rnnfast.backends import BACKENDS, cuda_plan, triton

CELLS = [f"rnn_{f}" for f in NONLINEARITIES]
EVERYTHING = {
    "norm": True,
    "reset": True,
    "lengths": True,
    "bptt_window": 3,
    "clip_state_grad": 0.5,
    "per_sample": True,
}
TF32 = 2.0**-11  # the rounding of an operand to 10 bits
HALVES = [torch.bfloat16, torch.float16]


class Place(NamedTuple):
    """Sizes are as large as the place has time for."""

    name: str
    backend: str
    sizes: list[tuple[torch.dtype, int]]  # dtype, units
    problems: Callable[[int], Iterator[dict]]  # of so many units: arguments of make_case
    long: tuple[int, int]  # T, B
    sequences: list[torch.dtype]  # of whole sequences beside nn.RNN
    examples: int = 0  # of options in any combination
    rows: int = 9  # B at most, in those
    units: tuple[int, ...] = (12,)  # in those

    @property
    def dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(dtype for dtype, _ in self.sizes))

    def rounding(self, dtype: torch.dtype) -> dict[str, float]:
        return own_rounding(self.backend, dtype)

    @property
    def cells(self) -> list[str]:
        """Those of CELLS that the backend has kernels for."""
        return [c for c in CELLS if c in getattr(BACKENDS[self.backend], "KERNELS_OF", CELLS)]

    def combinations(self, cells: list[str] | None = None) -> st.SearchStrategy[dict]:
        """Arguments of case_of."""
        return st.fixed_dictionaries(
            {
                "cell": st.sampled_from(cells or self.cells),
                "T": st.integers(1, 6),
                "B": st.integers(1, self.rows),
                "H": st.sampled_from(self.units),
                "D": st.integers(1, 2),
                "dtype": st.sampled_from(self.dtypes),
                "seed": st.integers(0, 1000),
                "lengths": st.booleans(),
                "heads": st.sampled_from([1, 2, 3]),
                "norm": st.booleans(),
                "reset": st.booleans(),
                "bptt_window": st.sampled_from([None, 1, 3]),
                "clip_state_grad": st.sampled_from([None, 0.5, 5.0]),
                "per_sample": st.booleans(),
            }
        )


def case_of(cell: str, **arguments) -> Case:
    return make_case(nonlinearity=cell.removeprefix("rnn_"), **arguments)


def on_the_cpu(units: int) -> Iterator[dict]:
    shapes = itertools.product([1, 2, 5], [1, 3, 7], [1, 2], [False, True], CELLS)
    for seed, (T, B, D, lengths, cell) in enumerate(shapes):
        yield {"T": T, "B": B, "D": D, "lengths": lengths, "cell": cell, "seed": seed}


def in_the_emulation(units: int) -> Iterator[dict]:
    """Every padded size, parts of a slice of eight rows; plain kernels, and with everything."""
    shapes = [(1, 1, 1), (2, 3, 2), (7, 9, 1)] if units < 100 else [(1, 9, 1), (3, 3, 2)]
    for seed, ((T, B, D), options) in enumerate(itertools.product(shapes, ({}, EVERYTHING))):
        yield {"T": T, "B": B, "D": D, "cell": CELLS[seed % 3], "seed": seed, **options}


def in_the_interpreter(units: int) -> Iterator[dict]:
    for seed, (T, B, D) in enumerate(itertools.product([1, 4], [1, 3, 17], [1, 2])):
        options = {"lengths": seed % 2 == 0, "per_sample": True}
        yield {"T": T, "B": B, "D": D, "cell": CELLS[seed % 3], "seed": seed, **options}


ODD = (1, 3, 17, 33, 100)
PLACES = [
    Place(
        "native-cpu", "cpu", list(itertools.product(FLOATS, (*ODD, 129))), on_the_cpu, (2000, 3), []
    ),
    Place(
        "reference", "reference", list(itertools.product(FLOATS, (3, 18))), on_the_cpu, (60, 3), []
    ),
    Place(
        "emulated-cuda",
        "cuda",
        [
            *itertools.product([torch.float32, *HALVES], (*ODD, 128)),
            *itertools.product(HALVES, (129, 256)),
        ],
        in_the_emulation,
        (400, 2),
        [torch.float32, *HALVES],
        examples(120),
        17,
        (6, 12, 30, 66),
    ),
    Place(
        "interpreted-triton",
        "triton",
        # 129 units of float32 are tiled. numpy has no bfloat16.
        list(itertools.product([torch.float32, torch.float16], (*ODD, 129))),
        in_the_interpreter,
        (200, 2),
        [torch.float32, torch.float16],
        examples(25),
    ),
]
NATIVE, REFERENCE, EMULATED, INTERPRETED = PLACES
THERE = {
    "cpu": True,
    "reference": True,
    "cuda": bool(cuda_plan.EMULATION),
    "triton": triton.INTERPRETED,
}
MARKS = {"cpu": [needs_cpu]}
HERE = [
    pytest.param(place, id=place.name, marks=MARKS.get(place.backend, []))
    for place in PLACES
    if THERE[place.backend]
]
every_place = pytest.mark.parametrize("place", HERE)
every_cell = pytest.mark.parametrize("cell", CELLS)


def of_each(what: Callable[[Place], list]) -> list:
    """Each place with each of what is asked there."""
    return [
        pytest.param(param.values[0], *value, marks=param.marks, id=name)
        for param in HERE
        for value in what(param.values[0])
        for name in [f"{param.id}-{'-'.join(str(v).removeprefix('torch.') for v in value)}"]
    ]
