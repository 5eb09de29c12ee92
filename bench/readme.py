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
from rnnfast.bench.workload import BOTH, BUSY, MANY

BEGIN, END = "<!-- made by python -m bench.readme -->", "<!-- end -->"
FEATURES = "<!-- features, made by python -m bench.readme -->"
RESULTS = Path("bench/results")
SHOWN_SIZES = ((128, 1, 64), (512, 32, 128), (256, 32, 256), (64, 64, 1024))  # in README.md
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
    """The sizes of SHOWN_SIZES and the size with the lowest ratio to nn.RNN."""
    found, machine = read_csv(results / "cpu.csv")
    plain = [row for row in _ours(found) if row.work.plain]
    shown = {(row.T, row.B, row.H): row for row in plain if row.kind == "listed"}
    worst, next_worst, *_, best = sorted(plain, key=lambda row: row.over_torch)
    behind_jax = sum(bool(row.over_jax) and row.over_jax < 1 for row in plain)
    yield _where(machine)
    yield ""
    yield from _times([*(shown[size] for size in SHOWN_SIZES), worst], found)
    yield ""
    yield (
        f"The last row is the slowest of {len(plain)} sizes; the others gain "
        f"{next_worst.over_torch:.2g}x to {best.over_torch:.2g}x. "
        f"jax.lax.scan under jit beats rnnfast at {behind_jax} sizes."
    )


def all_figures(results: Path) -> Iterator[str]:
    """The listed sizes, the summary over all sizes, other kinds of layers, and the options."""
    found, machine = read_csv(results / "cpu.csv")
    ours = _ours(found)
    yield _where(machine)
    yield ""
    yield from _times([row for row in ours if row.kind == "listed"], found, share=True)
    yield ""
    yield from _summary([row for row in ours if row.work.plain])
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


def _times(rows: list[Row], found: list[Row], share: bool = False) -> Iterator[str]:
    torch = {row.work: row for row in found if row.provider == "torch" and row.what == BOTH}
    heads = ["(T, B, H)", "nn.RNN, ms", "rnnfast.RNN, ms", "speed-up"]
    heads += ["share of the GEMM rate"] if share else []
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        cells = [str(row.work), _ms(torch[row.work]), _ms(row), f"{row.over_torch:.2f}x"]
        cells += [f"{row.floor_share:.0%}"] if share else []
        yield f"| {' | '.join(cells)} |"


def _summary(plain: list[Row]) -> Iterator[str]:
    heads = "peer", "sizes", "rnnfast is faster at", "lowest", "highest", "rnnfast is slower at"
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for peer, column in (("nn.RNN", "over_torch"), ("jax.lax.scan under jit", "over_jax")):
        ratios = [(getattr(row, column), row.work) for row in plain if getattr(row, column)]
        ratios.sort(key=lambda pair: pair[0])
        slower = [f"{work} {ratio:.2f}x" for ratio, work in ratios if ratio <= 1]
        ends = " | ".join(f"{ratio:.2g}x at {work}" for ratio, work in (ratios[0], ratios[-1]))
        faster = len(ratios) - len(slower)
        yield f"| {peer} | {len(ratios)} | {faster} | {ends} | {', '.join(slower) or 'none'} |"


def _variants(ours: list[Row]) -> Iterator[str]:
    """Ratios of other precisions and stacks."""
    variants = [row for row in ours if row.kind == "variant" and row.over_torch]
    yield f"| at ({variants[0].T}, {variants[0].B}, {variants[0].H}) | speed-up over nn.RNN |"
    yield "|---|---|"
    for row in variants:
        yield f"| {' '.join(row.work.beyond())} | {row.over_torch:.2g}x |"


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
