"""``python -m bench.cures``: trains each cure, writes docs/cures.csv and its table."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from rnnfast.demo.tasks import digits_then_noise
from rnnfast.gradient_flow.text import number_of_steps
from rnnfast.report import cpu_name

from .cures import CURES, Cure, Outcome, outcomes

BEGIN, END = "<!-- made by python -m bench.cures -->", "<!-- end -->"
COLUMNS = ("kind", "network", "optimizer", "seed", "accuracy", "half_life_first", "half_life_last")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cures", description=__doc__)
    parser.add_argument("--delay", type=int, default=100, help="steps of noise")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=sorted({cure.kind for cure in CURES}),
        help="trains these remedies alone; cures.csv keeps its rows of all others",
    )
    options = parser.parse_args()
    task = digits_then_noise(options.delay, seed=0, epochs=options.epochs)
    found: dict[Cure, list[Outcome]] = {cure: [] for cure in CURES}
    chosen = tuple(cure for cure in CURES if not options.kinds or cure.kind in options.kinds)
    for cure in CURES:
        if cure not in chosen:
            found[cure] = kept(cure, options.out / "cures.csv")
    with tqdm(total=len(chosen) * options.seeds, unit="network", disable=None) as progress:
        for cure, outcome in outcomes(chosen, task, options.seeds):
            found[cure].append(outcome)
            progress.update()
    with (options.out / "cures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for cure, runs in found.items():
            for seed, run in enumerate(runs):
                lives = [f"{half_life(growth):.4g}" for growth in (run.first, run.last)]
                row = [cure.kind, cure.name, cure.optimizer, seed, f"{run.accuracy:.4f}", *lives]
                writer.writerow(row)
    page = options.out / "gradient_flow.md"
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    old, _, tail = rest.partition(END)
    lines = table(found).splitlines()
    for i, cure in enumerate(CURES, len(lines) - len(CURES)):
        if cure not in chosen:  # cures.csv has too few digits to round them again
            begin = f"| {cure.kind} | {cure.name} |"
            lines[i] = next(line for line in old.splitlines() if line.startswith(begin))
    how = (
        f"{options.delay} steps of noise, {options.epochs} epochs, {options.seeds} seeds; torch "
        f"{torch.__version__}, {cpu_name()}."
    )
    rows = "\n".join(lines)
    page.write_text(f"{head}{BEGIN}\n\n{rows}\n\n{how}\n\n{END}{tail}")


def kept(cure: Cure, path: Path) -> list[Outcome]:
    """The runs of an earlier measurement."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == cure.name]
    return [
        Outcome(
            float(row["accuracy"]),
            *(-math.log(2) / float(row[f"half_life_{when}"]) for when in ("first", "last")),
        )
        for row in rows
    ]


def table(found: dict[Cure, list[Outcome]]) -> str:
    lines = [
        "| remedy | network | accuracy: mean (min to max) | half-life before training, steps "
        "| after training |",
        "|---|---|---|---|---|",
    ]
    for cure, runs in found.items():
        right = [run.accuracy for run in runs]
        spread = f"{statistics.fmean(right):.0%} ({min(right):.0%} to {max(right):.0%})"
        first, last = (
            in_words(half_life(statistics.median(getattr(run, when) for run in runs)))
            for when in ("first", "last")
        )
        lines.append(f"| {cure.kind} | {cure.name} | {spread} | {first} | {last} |")
    return "\n".join(lines)


def in_words(half_life: float) -> str:
    return "no decay" if math.isinf(half_life) else number_of_steps(half_life)


def half_life(growth: float) -> float:
    return math.log(2) / -growth if growth < 0 else growth if math.isnan(growth) else math.inf


if __name__ == "__main__":
    main()
