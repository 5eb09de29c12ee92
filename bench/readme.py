"""``python -m bench.readme`` writes figures of bench/results into README.md and docs/speed.md, and
the table of features into README.md."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import features
from rnnfast.bench.rows import Row, read_csv
from rnnfast.bench.workload import BOTH, BUSY, MANY, MODULES, Workload

BEGIN, END = "<!-- made by python -m bench.readme -->", "<!-- end -->"
FEATURES = "<!-- features, made by python -m bench.readme -->"
RESULTS = Path("bench/results")
SHOWN_SIZES = ((128, 1, 64), (512, 32, 128), (256, 32, 256), (64, 64, 1024))  # in README.md
SHOWN_KINDS = ("listed", "gated")  # in docs/speed.md
OPTIONS_SIZE = ("512", "32", "128")
OTHER_KINDS = ("threads", MANY, BUSY)  # not measured with two threads on an idle machine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in PAGES:
        page = options.root / name
        page.write_text(with_figures(name, page.read_text(), options.results))
    return 0


def with_figures(name: str, page: str, results: Path) -> str:
    """This page of PAGES with the figures of these results, and README.md with its features."""
    page = with_lines(page, BEGIN, "\n".join(PAGES[name](results)))
    return with_lines(page, FEATURES, "\n".join(features.table())) if name == "README.md" else page


def with_lines(page: str, begin: str, lines: str) -> str:
    """The page with these lines between the line ``begin`` and the next END.

    Raises:
        ValueError: the page lacks one of the two lines.
    """
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"the page lacks the lines {begin} and {END}")
    return "\n".join([f"{before}{begin}", lines, f"{END}{after}"])


def few_figures(results: Path) -> Iterator[str]:
    """The sizes of SHOWN_SIZES and the size with the lowest ratio to torch, for each module."""
    found, machine = read_csv(results / "cpu.csv")
    by_cell = _by_cell(found)
    torch = _torch(found)
    yield _where(machine)
    yield ""
    yield f"| (T, B, H) | {' | '.join(by_cell)} |"
    yield "|---" * (1 + len(by_cell)) + "|"
    for size in SHOWN_SIZES:
        cells = [
            next((_ratio(row, torch) for row in rows if row.work.size == size), "-")
            for rows in by_cell.values()
        ]
        yield f"| {size} | {' | '.join(cells)} |"
    slowest = [min(rows, key=lambda row: row.over_torch) for rows in by_cell.values()]
    cells = [f"{row.work.size}: {_ratio(row, torch)}" for row in slowest]
    yield f"| slowest size | {' | '.join(cells)} |"
    yield ""
    counts = ", ".join(f"{len(rows)} ({name})" for name, rows in by_cell.items())
    behind = ", ".join(
        f"{sum(bool(row.over_jax) and row.over_jax < 1 for row in rows)} ({name})"
        for name, rows in by_cell.items()
    )
    yield f"Sizes measured: {counts}. jax.lax.scan under jit beats rnnfast at {behind}."


def all_figures(results: Path) -> Iterator[str]:
    """The sizes of each module, the summary over all sizes, other kinds of layers, and the
    options."""
    found, machine = read_csv(results / "cpu.csv")
    ours, torch, by_cell = _ours(found), _torch(found), _by_cell(found)
    yield _where(machine)
    for name, rows in by_cell.items():
        yield ""
        yield from _times(name, [row for row in rows if row.kind in SHOWN_KINDS], torch)
    yield ""
    yield from _summary(by_cell)
    yield ""
    yield from _variants(ours)
    yield ""
    yield from _options(results)


PAGES = {"README.md": few_figures, "docs/speed.md": all_figures}


def _ours(found: list[Row]) -> list[Row]:
    return [row for row in found if row.ours and row.what == BOTH and row.kind not in OTHER_KINDS]


def _where(machine: dict[str, str]) -> str:
    where = f"{machine['processor']} ({machine['simd']}), 2 threads, torch {machine['torch']}"
    return f"{where}, commit {machine['commit']}, {machine['date']}:"


def _by_cell(found: list[Row]) -> dict[str, list[Row]]:
    """Our plain layers of each module that was measured."""
    kinds = {name: module.__name__ for name, module in MODULES.items()}
    plain = [row for row in _ours(found) if not row.work.beyond()]
    by_cell = {name: [row for row in plain if row.cell == cell] for cell, name in kinds.items()}
    return {name: rows for name, rows in by_cell.items() if rows}


def _torch(found: list[Row]) -> dict[Workload, Row]:
    return {row.work: row for row in found if row.provider == "torch" and row.what == BOTH}


def _ratio(row: Row, torch: dict[Workload, Row]) -> str:
    return f"{row.over_torch:.2f}x ({_ms(torch[row.work])} / {_ms(row)})"


def _times(name: str, rows: list[Row], torch: dict[Workload, Row]) -> Iterator[str]:
    heads = ["(T, B, H)", f"nn.{name}, ms", f"rnnfast.{name}, ms", "speed-up"]
    yield f"| {' | '.join([*heads, 'share of the GEMM rate'])} |"
    yield "|---" * (1 + len(heads)) + "|"
    for row in rows:
        cells = [str(row.work.size), _ms(torch[row.work]), _ms(row), f"{row.over_torch:.2f}x"]
        yield f"| {' | '.join(cells)} | {row.floor_share:.0%} |"


def _summary(by_cell: dict[str, list[Row]]) -> Iterator[str]:
    heads = "module", "peer", "sizes", "rnnfast is faster at", "lowest", "highest"
    yield f"| {' | '.join([*heads, 'rnnfast is slower at'])} |"
    yield "|---" * (1 + len(heads)) + "|"
    for name, rows in by_cell.items():
        for peer, column in ((f"nn.{name}", "over_torch"), ("jax.lax.scan under jit", "over_jax")):
            ratios = [(getattr(row, column), row.work) for row in rows if getattr(row, column)]
            if not ratios:
                continue
            ratios.sort(key=lambda pair: pair[0])
            slower = [f"{work.size} {ratio:.2f}x" for ratio, work in ratios if ratio <= 1]
            ends = " | ".join(
                f"{ratio:.2g}x at {work.size}" for ratio, work in (ratios[0], ratios[-1])
            )
            counts = f"{len(ratios)} | {len(ratios) - len(slower)}"
            yield f"| {name} | {peer} | {counts} | {ends} | {', '.join(slower) or 'none'} |"


def _variants(ours: list[Row]) -> Iterator[str]:
    """Ratios of other precisions and stacks."""
    of_rnn = [row for row in ours if row.kind == "variant" and row.over_torch]
    packed = [row for row in ours if row.kind == "gated" and row.packed and row.over_torch]
    yield "| (T, B, H) | layer | speed-up over torch's module |"
    yield "|---|---|---|"
    for row in [*of_rnn, *packed]:
        what = " ".join([MODULES[row.cell].__name__, *row.work.beyond()])
        yield f"| {row.work.size} | {what} | {row.over_torch:.2g}x |"


def _options(results: Path) -> Iterator[str]:
    with (results / "cpu_options.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["T"], r["B"], r["H"]) == OPTIONS_SIZE]
    yield f"Options at ({', '.join(OPTIONS_SIZE)}), {rows[0]['processor']} ({rows[0]['simd']}):"
    yield ""
    yield "| layer | ms | time / plain | time / layer norm's |"
    yield "|---|---|---|---|"
    for row in rows:
        ratios = f"{float(row['over_plain']):.2f} | {float(row['over_layer_norm']):.2f}"
        yield f"| {row['what']} | {1e3 * float(row['median_s']):.1f} | {ratios} |"


def _ms(row: Row) -> str:
    return f"{1e3 * row.median_s:.3g}"


if __name__ == "__main__":
    sys.exit(main())
