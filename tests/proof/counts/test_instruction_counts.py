"""No change makes the kernels longer unnoticed: instructions of fixed problems against recorded
ones. Where times are too noisy to tell a few percent, these do not vary at all."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import record_counts as record

BAND = 0.03  # wide enough for another minor version of the compiler
# How many more instructions than without it forward and backward may take, at H >= 128.
COST = {"norm": 0.35, "clip": 0.10, "record": 0.03}
COST_OF_GATED = {"clip": 0.03, "record": 0.03}


@pytest.fixture(scope="module")
def program() -> Path:
    reason = record.unavailable() or record.incomparable()
    if reason is not None:
        pytest.skip(f"no instruction counts: {reason}")
    return record.build()


@functools.cache
def count(program: Path, case: str, direction: str) -> int:
    return record.count(program, case, direction)


@pytest.mark.parametrize("direction", record.DIRECTIONS)
@pytest.mark.parametrize("case", record.CASES)
def test_kernels_take_the_recorded_number_of_instructions(program, case, direction):
    expected = json.loads(record.RECORDED.read_text())["counts"][case][direction]
    actual = count(program, case, direction)
    change = actual / expected - 1
    assert abs(change) <= BAND, (
        f"{direction} of {case} takes {actual} instructions, {abs(change):.1%} "
        f"{'more' if change > 0 else 'fewer'} than the {expected} recorded. "
        f"If that is meant, record it: {record.COMMAND}"
    )


@pytest.mark.parametrize("size", record.WITH_OPTIONS)
@pytest.mark.parametrize(
    ("cell", "option"), [(c, o) for c, options in record.CELLS.items() for o in options]
)
def test_an_option_costs_no_more_than_it_may(program, cell, size, option):
    plain, asked = (
        sum(count(program, case, direction) for direction in record.DIRECTIONS)
        for case in (record.name_of(cell, size), record.name_of(cell, size, option))
    )
    most = (COST if cell == "rnn_tanh" else COST_OF_GATED)[option]
    assert asked / plain - 1 <= most, f"{option}: {asked / plain - 1:.1%} more"


@pytest.mark.parametrize("direction", record.DIRECTIONS)
def test_counts_do_not_vary(program, direction):
    case = next(iter(record.CASES))
    assert record.count(program, case, direction) == record.count(program, case, direction)


def test_compilers_are_compared_by_family_and_major_version():
    assert record.family_and_major("g++ (Debian 12.2.0-14+deb12u1) 12.2.0") == ("gcc", "12")
    assert record.family_and_major("c++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0") == ("gcc", "11")
    assert record.family_and_major("g++ (GCC) 14.2.1 20250110") == ("gcc", "14")
    assert record.family_and_major("Ubuntu clang version 18.1.3 (1ubuntu1)") == ("clang", "18")
