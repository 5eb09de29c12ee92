"""What each CUDA kernel was estimated to take for a step, and what it takes: the figures that
csrc/cuda/plan.cpp is to be corrected by. On a GPU, a minute at most.

    python -m bench.cuda_plans --out bench/results
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rnnfast.arguments import positive
from rnnfast.backends import cuda

DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "exact": torch.float32}
UNITS = (64, 128, 256, 512, 768, 1024, 1280, 2048, 4096)
ROWS = (1, 16, 64, 256)
NAMES = {number: name for name, number in cuda.NAMES.items() if name}


class Row(NamedTuple):
    """Microseconds of a step, one layer and direction; the estimate is of forward."""

    mode: str
    units: int
    rows: int
    norm: bool
    kernel: str
    columns: int
    of_units: int  # what the kernel is compiled for, or a block of the streaming one multiplies
    estimated: float
    forward: float
    backward: float


def measure(device: str, sizes: Iterable[tuple[str, int, int, bool]]) -> Iterator[Row]:
    """The best plan of each kernel, by its estimate, the fastest first."""
    for mode, units, rows, norm in sizes:
        like = torch.empty(0, dtype=DTYPES[mode], device=device)
        size, seen = (mode, units, 1, rows, norm), set()
        for plan in cuda.KERNELS.cuda_plans(*size, *cuda._device(device, None, mode)):
            kernel, columns, of_units = plan.wanted
            if kernel in seen:
                continue
            seen.add(kernel)
            times = cuda.seconds_of(size, plan, like)
            forward, backward = (1e6 * t / cuda.STEPS for t in times)
            found = NAMES[kernel], columns, of_units, plan.step, forward, backward
            yield Row(mode, units, rows, norm, *found)


def summary(rows: Sequence[Row]) -> str:
    """How far off the estimates are, and what the plan's choice costs."""
    lines = [f"{'kernel':14}{'sizes':>6}  measured / estimated: median, least, most"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        ratios = [row.forward / row.estimated for row in rows if row.kernel == kernel]
        middle = statistics.median(ratios)
        lines.append(
            f"{kernel:14}{len(ratios):6}  {middle:.2f}, {min(ratios):.2f}, {max(ratios):.2f}"
        )
    lost = []
    for _, found in itertools.groupby(rows, key=lambda row: row[:4]):
        first, *others = found
        lost.append(first.forward / min(row.forward for row in (first, *others)))
    right = sum(ratio == 1 for ratio in lost)
    lines.append(
        f"the plan takes the fastest of them for {right} of {len(lost)} sizes, elsewhere "
        f"{max(lost):.2f} times its time at most"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_plans", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    for name, default in (("--units", UNITS), ("--rows", ROWS)):
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N")
    args = parser.parse_args(argv)
    device = "cpu" if cuda.EMULATION else "cuda"
    if cuda.KERNELS is None or (device == "cuda" and not torch.cuda.is_available()):
        print("python -m bench.cuda_plans: wanted a GPU, and the extension with CUDA kernels")
        return 2
    sizes = itertools.product(DTYPES, args.units, args.rows, (False, True))
    rows = list(measure(device, sizes))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "cuda-plans.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in rows)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
