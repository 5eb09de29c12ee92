"""Times layers of a stack one after another and side by side (RNNFAST_OVERLAP), and compares the
results. On a GPU, half a minute at most.

    python -m bench.cuda_overlap --out bench/results
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import rnnfast
from rnnfast.backends import cuda_clock, cuda_plan
from rnnfast.command_arguments import positive
from rnnfast.modules import wavefront

LAYERS = (2, 4, 8)
UNITS = (128, 256, 512)
RUNS = 5
MOST_DIFFERENCE = 0.03  # some roundings of bfloat16


class Row(NamedTuple):
    """Milliseconds of a call of a stack in bfloat16, the least of some runs in turns."""

    layers: int
    units: int
    rows: int
    steps: int  # of a sequence
    stretch: int  # steps of a layer before the next layer begins; 0: never side by side
    what: str  # forward without gradients, or forward and backward
    apart: float
    together: float
    difference: float  # relative difference of the results: of y, or the largest of the gradients


def measure(
    device: str, sizes: Iterable[tuple[int, int, int, int]], backend: str = "cuda"
) -> Iterator[Row]:
    for layers, units, rows, T in sizes:
        options = {"backend": backend, "device": device, "dtype": torch.bfloat16}
        rnn = rnnfast.RNN(units, units, layers, **options)
        x = torch.randn(T, rows, units, device=device, dtype=torch.bfloat16, requires_grad=True)
        wavefront.ENABLED = True
        stretch = rnn._stretch("cuda", T, rnn._problem(x))

        def forward(rnn=rnn, x=x) -> None:
            with torch.no_grad():
                rnn(x)

        def training(rnn=rnn, x=x) -> None:
            rnn(x)[0].sum().backward()

        y, *gradients = _differences(rnn, x)
        for what, run, off in (
            ("forward", forward, y),
            ("forward+backward", training, max(gradients)),
        ):
            yield Row(layers, units, rows, T, stretch, what, *_in_turns(run, x.device), off)


def _in_turns(run: Callable[[], None], device: torch.device) -> list[float]:
    times: dict[bool, list[float]] = {False: [], True: []}
    for _, together in itertools.product(range(RUNS + 1), times):
        wavefront.ENABLED = together
        times[together].append(1e3 * cuda_clock.timed(run, device))
    return [min(found[1:]) for found in times.values()]


def _differences(rnn: rnnfast.RNN, x: torch.Tensor) -> list[float]:
    found = []
    for together in (False, True):
        wavefront.ENABLED = together
        y, _ = rnn(x)
        leaves = (x, *rnn.parameters())
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    return [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(*found)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_overlap", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    for name, default in (("--layers", LAYERS), ("--units", UNITS)):
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N")
    parser.add_argument("--rows", type=positive, default=16, metavar="B")
    parser.add_argument("--steps", type=positive, default=512, metavar="T")
    args = parser.parse_args(argv)
    if cuda_plan.KERNELS is None or not torch.cuda.is_available():
        print("python -m bench.cuda_overlap: wanted a GPU, and the extension with CUDA kernels")
        return 2
    sizes = itertools.product(args.layers, args.units, [args.rows], [args.steps])
    args.out.mkdir(parents=True, exist_ok=True)
    good = True
    with (args.out / "cuda-overlap.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in measure("cuda", sizes):
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in row])
            print(
                f"{row.layers} layers of {row.units} units, {row.what}: {row.apart:.3f} ms one "
                f"after another, {row.together:.3f} ms {row.stretch} steps at a time "
                f"({row.apart / row.together:.2f}x)",
                flush=True,
            )
            if not row.difference <= MOST_DIFFERENCE:
                print(f"  FAILED: the results differ by {row.difference:g}", flush=True)
                good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
