"""``python -m rnnfast validate`` computes the rows, prints a table and a verdict, and draws."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from ..backends import BACKENDS
from ..gradient_flow.text import plain
from ..recurrence import precision
from ..report import machine
from .cases import CELLS_OF
from .kernels import Arithmetic
from .picture import draw
from .plan import ARITHMETICS, SIZES, Task, refusal, tasks
from .rows import Row
from .runs import threads
from .table import LEGEND, summary, table

JUDGE = "reference"


class BadInput(ValueError):
    """The request cannot be validated. The message says why, in one line."""


def run(
    out: Path,
    *,
    backends: Sequence[str] = (),
    cells: Sequence[str] = tuple(CELLS_OF),
    dtypes: Sequence[str] = (),
    device: str | None = None,
    size: str = "default",
    groups: Sequence[str] | None = None,
) -> dict:
    """Validates, prints, and writes ``validate.json`` and ``validate.png`` into the folder ``out``.

    Args:
        backends: names; empty for all backends that can run on the device, without the reference,
            which is the judge.
        cells: some of "RNN", "LSTM" and "GRU".
        dtypes: names of plan.ARITHMETICS; empty for all dtypes of the device.
        device: "cpu" or "cuda"; None for "cuda" if there is a GPU.
        size: "quick", "default" or "full".
        groups: names of plan.GROUP_NAMES; None for all.

    Returns:
        The content of validate.json. "passed" says whether every result is within its budget.

    Raises:
        BadInput: there is no such device, or a named backend or dtype cannot run.
    """
    start = time.perf_counter()
    device = _device(device)
    arithmetics = _arithmetics(dtypes, device)
    chosen, left_out = _choose(backends, arithmetics, bool(dtypes), device)
    todo = [t for b, a in chosen for t in tasks(b, a, device, SIZES[size], groups)]
    todo = [task for task in todo if task.row.cell in cells]
    _compute(todo)
    rows = [task.row for task in todo]
    result = {
        "machine": machine(device) | {"threads": torch.get_num_threads()},
        "settings": {"size": size, "device": device, "cells": list(cells), "groups": groups},
        "seconds": time.perf_counter() - start,
        "passed": all(row.word != "FAILED" for row in rows),
        "left_out": left_out,
        "rows": [row.to_dict() for row in rows],
    }
    text = json.dumps(plain(result), indent=1, allow_nan=False)
    (out / "validate.json").write_text(text + "\n")
    draw(rows, result["machine"], out / "validate.png")
    _print(rows, result, out)
    return result


# ----------------------------------------------------------------------------------- the request


def _device(name: str | None) -> str:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise BadInput("--device: given cuda, and torch finds no CUDA device here")
    return name or ("cuda" if there else "cpu")


def _arithmetics(names: Sequence[str], device: str) -> list[Arithmetic]:
    known = [a for a in ARITHMETICS.values() if device == "cuda" or not a.tf32]
    wrong = [name for name in names if name not in [a.name for a in known]]
    if wrong:
        wanted = ", ".join(a.name for a in known)
        raise BadInput(f"--dtype: given {wrong[0]}, wanted of those on {device}: {wanted}")
    return [a for a in known if not names or a.name in names]


def _choose(
    names: Sequence[str], arithmetics: list[Arithmetic], dtypes_given: bool, device: str
) -> tuple[list[tuple[str, Arithmetic]], dict[str, str]]:
    """The backends with their dtypes, and why others are left out."""
    chosen, left_out = [], {}
    for name in dict.fromkeys(names or BACKENDS):
        if not names and name == JUDGE:
            left_out[name] = "it is the judge; --backend reference validates it"
            continue
        reasons = {a: refusal(name, a, device) for a in arithmetics}
        refused = {a: why for a, why in reasons.items() if why}
        if names and refused and (dtypes_given or len(refused) == len(reasons)):
            a, why = next(iter(refused.items()))
            raise BadInput(f"--backend: {name} cannot run {a.name} on {device}: {why}")
        if len(refused) == len(reasons):
            left_out[name] = next(iter(refused.values()))
        else:
            left_out |= {f"{name} in {a.name}": why for a, why in refused.items()}
        chosen += [(name, a) for a in arithmetics if a not in refused]
    return chosen, left_out


# ---------------------------------------------------------------------------------- the computation


def _compute(todo: Sequence[Task]) -> None:
    bar = tqdm(todo, unit="row", disable=None, leave=False)
    with _outputs_start_as_nan(), threads(1), bar as progress:
        for row, where, parts in progress:
            progress.set_postfix_str(row.name)
            start = time.perf_counter()
            try:
                with precision.tf32(where.arithmetic.tf32):
                    for part in parts:
                        part(row, where)
            except Exception as error:  # a backend's error fails this row only
                row.complain(f"it raised {type(error).__name__}: {' '.join(str(error).split())}")
            row.seconds = time.perf_counter() - start


@contextlib.contextmanager
def _outputs_start_as_nan() -> Iterator[None]:
    """Fills new tensors with NaN, so that the judge finds an element that no kernel wrote."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _print(rows: Sequence[Row], result: dict, out: Path) -> None:
    found = table(rows, result["machine"])
    needed = Console(width=1000).measure(found).maximum  # about 120 columns, on any screen
    console = Console(width=max(needed, Console().width))
    console.print(found)
    for line in (LEGEND, *summary(rows, result)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Wrote {out / 'validate.json'} and {out / 'validate.png'}", highlight=False, soft_wrap=True
    )
