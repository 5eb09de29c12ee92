"""``python -m bench.readme``: README.md's figures, made from bench/results."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from rnnfast.bench.rows import Row, read_csv
from rnnfast.bench.workload import BOTH, BUSY, MANY

BEGIN, END = "<!-- made by python -m bench.readme -->", "<!-- end -->"
RESULTS = Path("bench/results")
OPTIONS_AT = ("512", "32", "128")
APART = ("threads", MANY, BUSY)  # kinds of rows, none of an idle machine with two threads


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    text = options.readme.read_text()
    options.readme.write_text(with_figures(text, options.results))
    return 0


def with_figures(readme: str, results: Path) -> str:
    return with_lines(readme, BEGIN, figures(results))


def with_lines(page: str, begin: str, lines: str) -> str:
    """The page with these lines between that line and the next END.

    Raises:
        ValueError: it has no place for them.
    """
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"the page lacks the lines {begin} and {END}")
    return "\n".join([f"{before}{begin}", lines, f"{END}{after}"])


def figures(results: Path) -> str:
    found, machine = read_csv(results / "cpu.csv")
    ours = [row for row in found if row.ours and row.what == BOTH and row.kind not in APART]
    plain = [row for row in ours if row.work.plain]
    torch = {row.work: row for row in found if row.provider == "torch" and row.what == BOTH}
    where = f"{machine['processor']} ({machine['simd']}), 2 threads, torch {machine['torch']}"
    lines = [f"{where}, commit {machine['commit']}, {machine['date']}:", ""]
    lines += ["| (T, B, H) | nn.RNN, ms | rnnfast.RNN, ms | | of the machine's GEMM rate |"]
    lines += ["|---|---|---|---|---|"]
    for row in (row for row in ours if row.kind == "listed"):
        times = f"{_ms(torch[row.work])} | {_ms(row)} | {row.over_torch:.2f}x"
        lines.append(f"| {row.work} | {times} | {row.floor_share:.0%} |")
    lines += ["", _in_words(plain), "", *_variants(ours), "", *_options(results)]
    return "\n".join(lines)


def _in_words(plain: list[Row]) -> str:
    ratios = sorted(plain, key=lambda row: row.over_torch)
    faster = [row for row in ratios if row.over_torch > 1]
    slower = [f"{row.over_torch:.2f}x at {row.work}" for row in ratios if row.over_torch <= 1]
    text = (
        f"Over {len(ratios)} sizes, {len(faster)} were faster than nn.RNN, by "
        f"{faster[0].over_torch:.2g}x at {faster[0].work} to {faster[-1].over_torch:.2g}x at "
        f"{faster[-1].work}"
    )
    if slower:
        text += f"; not so {', '.join(slower)}"
    jax = sorted((row for row in plain if row.over_jax), key=lambda row: row.over_jax)
    behind = [f"{row.work} {row.over_jax:.2f}x" for row in jax if row.over_jax < 1]
    if jax:
        text += f". Beside jax.lax.scan under jit: faster at {len(jax) - len(behind)} of {len(jax)}"
    if behind:
        text += f"; behind it at {', '.join(behind)}"
    return text + "."


def _variants(ours: list[Row]) -> list[str]:
    """A line of what else a layer can be."""
    variants = [row for row in ours if row.kind == "variant" and row.over_torch]
    size = f"({variants[0].T}, {variants[0].B}, {variants[0].H})"
    told = ", ".join(f"{' '.join(row.work.beyond())} {row.over_torch:.2g}x" for row in variants)
    return [f"At {size} over nn.RNN: {told}."]


def _options(results: Path) -> list[str]:
    with (results / "cpu_options.csv").open(newline="") as file:
        lines = [
            row for row in csv.DictReader(file) if (row["T"], row["B"], row["H"]) == OPTIONS_AT
        ]
    machine = f"{lines[0]['processor']} ({lines[0]['simd']})"
    size = ", ".join(OPTIONS_AT)
    head = [f"What the options cost at ({size}), {machine}:", ""]
    head += ["| | ms | time / plain | time / layer norm's |", "|---|---|---|---|"]
    return head + [
        f"| {row['what']} | {1e3 * float(row['median_s']):.1f} | {float(row['over_plain']):.2f} | "
        f"{float(row['over_layer_norm']):.2f} |"
        for row in lines
    ]


def _ms(row: Row) -> str:
    return f"{1e3 * row.median_s:.3g}"


if __name__ == "__main__":
    sys.exit(main())
