"""Times the CUDA kernels beside their estimates, and a layer beside cuDNN. The figures correct the
launch plan (csrc/cuda/host/plan.cpp). On a GPU, a minute at most.

    python -m bench.cuda_plans --out bench/results            # every kernel of every size
    python -m bench.cuda_plans --first --out bench/results    # two dozen sizes, with cuDNN

A time is the slope between calls of two lengths, without the host's time
(rnnfast.backends.cuda.times_of). Every row is on disk before the next is measured.
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

import rnnfast
from rnnfast.backends import cuda, cuda_clock, cuda_plan
from rnnfast.command_arguments import positive
from rnnfast.recurrence import precision

DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "exact": torch.float32}
UNITS = (64, 128, 256, 512, 768, 1024, 1280, 2048, 4096)
ROWS = (1, 16, 64, 256)
# Two dozen sizes, those with a target first.
FIRST = [
    *itertools.product(DTYPES, (256, 512, 1024), (16,), (False,)),
    *itertools.product(("bfloat16",), (256, 512, 1024), (1, 64), (False,)),
    *itertools.product(("bfloat16",), (256, 512, 1024), (16,), (True,)),
    *itertools.product(("bfloat16", "exact"), (128, 768, 2048), (16,), (False,)),
]
NAMES = {number: name for name, number in cuda_plan.NAMES.items() if name}
MISS = 1.25  # a time this much above or below its estimate is a miss


class Row(NamedTuple):
    """Microseconds. The estimate is for forward. None means not measured."""

    mode: str
    units: int
    rows: int
    norm: bool
    kernel: str
    columns: int
    of_units: int  # units that the kernel is compiled for, or a tile of the streaming kernel
    estimated: float
    # The kernel alone: a step, and a call beside its steps.
    forward: float
    backward: float
    forward_call: float
    backward_call: float
    # A step of a whole layer with I = H and its products: ours, and nn.RNN on cuDNN.
    layer_forward: float | None = None
    layer_backward: float | None = None
    cudnn_forward: float | None = None
    cudnn_backward: float | None = None

    @property
    def miss(self) -> float:
        """The ratio of measurement and estimate, or its inverse, above 1."""
        return max(self.forward / self.estimated, self.estimated / max(self.forward, 1e-9))


def measure(
    device: str, sizes: Iterable[tuple[str, int, int, bool]], first: bool = False
) -> Iterator[Row]:
    """Times the best plan of each kernel by its estimate, the fastest first.

    Args:
        sizes: mode, units, rows, norm.
        first: only the plan's own choice, and layers beside cuDNN.
    """
    for mode, units, rows, norm in sizes:
        like = torch.empty(0, dtype=DTYPES[mode], device=device)
        size, seen = (mode, units, 1, rows, norm), set()
        for plan in cuda_plan.KERNELS.cuda_plans(*size, *cuda_plan.device_of(device, None, mode)):
            kernel, columns, of_units = plan.wanted
            if kernel in seen or (first and seen):
                continue
            seen.add(kernel)
            times = cuda.times_of(size, plan, like)
            found = [1e6 * time.step for time in times] + [1e6 * time.call for time in times]
            layers = of_layers(mode, units, rows, like) if first and not norm else ()
            names = NAMES[kernel], columns, of_units
            yield Row(mode, units, rows, norm, *names, plan.step, *found, *layers)


def of_layers(mode: str, units: int, rows: int, like: torch.Tensor) -> Iterator[float]:
    """Times forward and backward of rnnfast.RNN with its CUDA kernels, and of nn.RNN."""
    place = {"dtype": like.dtype, "device": like.device}
    with precision.tf32(mode == "tf32"):
        for rnn in (
            rnnfast.RNN(units, units, backend="cuda", **place),
            torch.nn.RNN(units, units, **place),
        ):
            calls = [layer_calls(rnn, T, rows, like) for T in cuda_clock.LENGTHS]
            yield from (1e6 * time.step for time in cuda_clock.slopes(calls, like.device))


def layer_calls(rnn: torch.nn.RNNBase, T: int, rows: int, like: torch.Tensor) -> tuple:
    x = like.new_zeros(T, rows, rnn.input_size).requires_grad_()
    leaves, grad = (x, *rnn.parameters()), like.new_zeros(T, rows, rnn.hidden_size)
    y, _ = rnn(x)

    def backward() -> None:
        torch.autograd.grad(y, leaves, grad, retain_graph=True)

    backward()
    return (lambda: rnn(x)), backward


def summary(rows: Sequence[Row]) -> str:
    """Lines: how far the estimates are off, and the cost of the plan's choice."""
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


def beside_cudnn(rows: Sequence[Row]) -> str:
    """The ratios to cuDNN in one line."""
    found = [
        (f"{row.mode} {row.units} units {row.rows} rows", theirs / ours)
        for row in rows
        for ours, theirs in (
            (row.layer_forward, row.cudnn_forward),
            (row.layer_backward, row.cudnn_backward),
        )
        if ours and theirs
    ]
    if not found:
        return "no layer was measured beside cuDNN"
    worst = min(found, key=lambda pair: pair[1])
    middle = statistics.median(ratio for _, ratio in found)
    return f"cuDNN takes {middle:.2f} times our step (median); at worst {worst[1]:.2f} ({worst[0]})"


def misses(rows: Sequence[Row], most: int = 5) -> list[str]:
    """Lines with the predictions that are furthest off. The summary keeps them."""
    far = sorted((row for row in rows if row.miss > MISS), key=lambda row: -row.miss)[:most]
    return [
        f"MISS {row.mode} {row.units} units, {row.rows} rows{', layer norm' if row.norm else ''}, "
        f"{row.kernel}: {row.forward:.2f} us a step forward, estimated {row.estimated:.2f}"
        for row in far
    ]


def cells(row: Row) -> list[object]:
    return [f"{v:.3f}" if isinstance(v, float) else "" if v is None else v for v in row]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_plans", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--first", action="store_true", help="two dozen sizes, beside cuDNN")
    for name, default in (("--units", UNITS), ("--rows", ROWS)):
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N")
    args = parser.parse_args(argv)
    device = "cpu" if cuda_plan.EMULATION else "cuda"
    if cuda_plan.KERNELS is None or (device == "cuda" and not torch.cuda.is_available()):
        print("python -m bench.cuda_plans: wanted a GPU, and the extension with CUDA kernels")
        return 2
    sizes = FIRST if args.first else itertools.product(DTYPES, args.units, args.rows, (False, True))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    name = "cuda-first.csv" if args.first else "cuda-plans.csv"
    with (args.out / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in measure(device, sizes, args.first):
            writer.writerow(cells(row))
            file.flush()
            rows.append(row)
    print("\n".join(misses(rows)))
    print(beside_cudnn(rows) if args.first else summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
