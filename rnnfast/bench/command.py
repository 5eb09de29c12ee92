"""``python -m rnnfast bench``: rnnfast and its peers take turns, each judged before it is timed. It
writes a CSV file and pictures, and prints a table."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .. import cores
from ..report import machine
from . import floors, picture, points, scarce, table
from .compare import compare
from .providers import BY_NAME, OURS, PROVIDERS, Provider
from .rows import FormatError, Row, write_csv
from .runner import Runner
from .workload import Workload

RESULTS = Path("bench/results")  # of a checkout; make gpu-probe writes here


class BadInput(ValueError):
    """The request cannot be measured. The message says why, in one line."""


def run(options: Namespace, providers: Sequence[Provider] = PROVIDERS) -> int:
    """0: measured, with any result; 1: a provider was wrong or raised.

    Raises:
        BadInput: the options do not fit together, or do not fit this machine.
    """
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no GPU here")
    known = {provider.name: provider for provider in providers}
    names = options.providers or [n for n in known if n not in {p.name for p in BY_NAME}]
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"--providers: given {unknown[0]!r}, wanted some of {list(known)}")
    chosen = [provider for name, provider in known.items() if name in names]
    chip, source = _chip(options)
    torch.set_num_threads(options.threads)
    seconds = options.seconds_per_workload or (0.1 if options.quick else 2.5)
    load = cores.load()  # before this run adds to it
    if load and load.loaded:
        say(f"WARNING: {busy(load)}")
    runner = Runner(chosen, seconds, 3 if options.quick else 7, chip)
    found = runner.measure(todo(options))
    if options.device == "cpu" and options.points is None and not options.quick:
        found += _ours(runner).thread_scaling()
        found += scarce.measure(_ours(runner, "torch"))
    facts = machine(options.device)
    for line in [f"{who} (first at {at})" for who, at in runner.left_out.items()]:
        say(f"left out: {line}")
    for line in dict.fromkeys(runner.notes):
        say(line)
    show(options, facts, found, runner, source, load)
    for failure in runner.failures:
        say(f"FAILED: {failure}")
    return 1 if runner.failures else 0


def todo(options: Namespace) -> list[Workload]:
    """
    Raises:
        BadInput: the device lacks a precision; options describe the layers and there are no points.
    """
    special = {
        "layers": options.layers,
        "directions": 2 if options.bidirectional else 1,
        "norm": options.norm or "",
        "packed": options.packed,
    }
    if options.points is None:
        if options.precisions or Workload(1, 1, 1, **special).beyond():
            raise BadInput("--precisions, --layers, ...: they are of --points, given without it")
        return points.quick(options.device) if options.quick else points.everything(options.device)
    precisions = options.precisions or ["float32"]
    if "tf32" in precisions and options.device == "cpu":
        raise BadInput("--precisions: tf32 is a precision of GPUs, given --device cpu")

    def work(size: tuple[int, int, int], precision: str) -> Workload:
        found = Workload(*size, precision=precision, device=options.device, **special)
        listed = found.plain and found.device == "cpu" and size in points.LISTED
        return Workload(*size, "listed") if listed else found

    return [work(size, p) for size in options.points for p in precisions]


def compared(old: Path, new: Path) -> int:
    """1 if something got slower.

    Raises:
        BadInput: the files cannot be compared.
    """
    try:
        moved, lines, slower = compare(old, new)
    except FormatError as error:
        raise BadInput(f"--compare: {error}") from None
    console = Console(width=max(100, Console().width))
    if moved.row_count:
        console.print(moved)
    for line in lines:
        console.print(line, highlight=False)
    return 1 if slower else 0


def busy(load: cores.Load) -> str:
    return (
        f"this machine was busy before the benchmark began, with a {load}. Milliseconds are longer "
        "than on an idle machine, and ratios of short calls are less certain"
    )


def show(
    options: Namespace,
    facts: dict[str, str],
    found: Sequence[Row],
    runner: Runner,
    source: str,
    load: cores.Load | None,
) -> None:
    """Writes the files first, so that they exist even if printing fails."""
    name = "cpu" if options.device == "cpu" else slug(facts["processor"])
    write_csv(found, facts, options.out / f"{name}.csv")
    where = facts["processor"]
    if options.device == "cpu":
        where += f", {options.threads} thread{'s' if options.threads > 1 else ''}"
    written = [f"{name}.csv", *picture.draw(found, where, options.out, name)]
    console = Console(width=max(150, Console().width))  # the table's width, on any screen
    console.print(table.table(found, where))
    lines = [source, *table.summary(found, runner.scaling)]
    if options.device == "cpu" and options.threads != 2:
        lines.append("The targets are meant for 2 threads.")
    if load:
        lines.append(f"WARNING: {busy(load)}" if load.loaded else f"at the start: {load}")
    for line in [*lines, f"written to {options.out}: {', '.join(written)}"]:
        console.print(line, highlight=False)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _chip(options: Namespace) -> tuple[floors.Chip | None, str]:
    """The figures of make gpu-probe, and a line about the floors."""
    products = "floors: from the rate of a large product of matrices, measured in this run"
    if options.device == "cpu":
        if options.probe:
            raise BadInput("--probe: a CPU's floors are measured in the run, given --device cpu")
        return None, products
    try:
        if options.probe:
            chip = floors.read_probe(options.probe)
        else:
            chip = floors.latest_probe(RESULTS, torch.cuda.get_device_name())
    except floors.ProbeError as error:
        raise BadInput(str(error)) from None
    if chip is None:
        return None, f"{products}; there are no figures of make gpu-probe for this GPU"
    return chip, f"{products}, and from make gpu-probe's figures of {chip.name}"


def _ours(runner: Runner, *others: str) -> Runner:
    """The runner with our own providers and these. Failures and scaling go to the same lists."""
    ours = [p for p in runner.providers if p in OURS or p.name in others]
    return Runner(
        ours, runner.seconds, runner.rounds, failures=runner.failures, scaling=runner.scaling
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
