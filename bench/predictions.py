"""``python -m bench.predictions`` writes the tables of docs/gpu_kernels.md: the predicted time of a
step of the CUDA kernels on an H200, beside the newest `make gpu-first` or `make gpu-check`."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rnnfast.backends import cuda_plan

from .cuda_plans import DTYPES, NAMES, ROWS, UNITS, Row
from .readme import with_lines

BEGIN = "<!-- made by python -m bench.predictions -->"
PAGE = Path("docs/gpu_kernels.md")
RESULTS = Path("bench/results")
RECORDED = Path("tests/proof/sass/recorded.json")
# Estimated: only the device can say how many clusters of 2, 4, 8, 16 blocks are resident.
H200 = cuda_plan.Device("H200", 90, 132, 227 << 10, (66, 32, 15, 7))
GIGAHERTZ = 1.98  # of an H200 under load
# Targets of a forward step: blocks and units of the kernel, microseconds.
WANTED = ((4, 256, 0.4), (16, 512, 0.5), (16, 1024, 0.8))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.page.write_text(with_tables(options.page.read_text(), options.results))
    return 0


def with_tables(page: str, results: Path) -> str:
    source, measured = newest(results)
    lines = [*of_the_model(measured), "", *of_the_plan(measured), ""]
    lines += [*beside_cudnn(measured), f"Measured: {source or 'nothing yet'}."]
    return with_lines(page, BEGIN, "\n".join(lines))


def newest(results: Path) -> tuple[str, dict[tuple, Row]]:
    """The last run of `make gpu-first` or `make gpu-check` by the date in its folder's name, and
    its rows by all that names them."""
    files = [f for name in ("plans", "first") for f in results.glob(f"gpu-*/cuda-{name}.csv")]
    if not files:
        return "", {}
    last = max((f.parent for f in files), key=lambda folder: folder.name[-15:])
    found = {}
    for path in (f for f in files if f.parent == last):  # rows beside cuDNN come last
        with path.open(newline="") as file:
            rows = [Row(**row) for row in csv.DictReader(file)]
        found |= {
            (row.mode, int(row.units), int(row.rows), row.norm == "True", row.kernel): row
            for row in rows
        }
    return last.name, found


def beside_cudnn(measured: dict[tuple, Row]) -> Iterator[str]:
    """Whole layers, ours and nn.RNN's, if a run has measured both."""
    rows = [(key, row) for key, row in measured.items() if row.cudnn_forward]
    if not rows:
        return
    yield "| us a step of a layer, I = H | forward | cuDNN | backward | cuDNN |"
    yield "|---" * 5 + "|"
    for (mode, units, batch, *_), row in rows:
        pairs = (
            (float(ours), float(theirs))
            for ours, theirs in (
                (row.layer_forward, row.cudnn_forward),
                (row.layer_backward, row.cudnn_backward),
            )
        )
        cells = [c for a, b in pairs for c in (f"{a:.2f}", f"{b:.2f} ({b / a:.1f}x)")]
        yield f"| {mode}, {units} units, {batch} rows | {' | '.join(cells)} |"
    yield ""


def of_the_model(measured: dict[tuple, Row]) -> Iterator[str]:
    """Cycles from the machine code as microseconds, beside the targets."""
    recorded = json.loads(RECORDED.read_text())
    at = recorded["columns"].index("cycles")

    def us(way: str, units: int, blocks: int, *options: str) -> float:
        name = " ".join(["sm_90 bfloat16", way, f"{units} units", f"{blocks} blocks", *options])
        return recorded["kernels"][name][at] / GIGAHERTZ / 1000

    heads = ("bfloat16, 16 rows", "target", "forward", "backward")
    heads += ("forward with layer norm", "backward with clipping")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for blocks, units, limit in WANTED:
        forward, backward = us("forward", units, blocks), us("backward", units, blocks)
        norm, clip = us("forward", units, blocks, "norm"), us("backward", units, blocks, "clip")
        key = ("bfloat16", units, 16, False, f"cluster{blocks}")
        found, normed = measured.get(key), measured.get((*key[:3], True, key[4]))
        cells = [
            f"{units} units, {blocks} blocks",
            f"{limit:.2f}",
            beside(forward, found and found.forward),
            beside(backward, found and found.backward),
            f"{beside(norm, normed and normed.forward)} (+{norm / forward - 1:.0%})",
            f"{clip:.2f} (+{clip / backward - 1:.0%})",
        ]
        yield f"| {' | '.join(cells)} |"


def of_the_plan(measured: dict[tuple, Row]) -> Iterator[str]:
    """The kernel that the plan chooses, and its estimate."""
    yield f"| forward, us a step | {' | '.join(f'B = {rows}' for rows in ROWS)} |"
    yield "|---" * (1 + len(ROWS)) + "|"
    for mode in DTYPES:
        for norm in (False, True):
            for units in UNITS:
                cells = [f"{mode}, {units} units{', layer norm' if norm else ''}"]
                for rows in ROWS:
                    plan = cuda_plan.EXTENSION.cuda_plan(mode, units, 1, rows, norm, *H200)
                    kernel = NAMES[plan.wanted[0]]
                    found = measured.get((mode, units, rows, norm, kernel))
                    cells.append(f"{kernel} {beside(plan.step, found and found.forward)}")
                yield f"| {' | '.join(cells)} |"


def beside(expected: float, found: str | None) -> str:
    return f"{expected:.2f}" + (f" → **{float(found):.2f}**" if found else "")


if __name__ == "__main__":
    sys.exit(main())
