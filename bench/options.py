"""Measures the cost of layer norm, clipping and the gradient record, and layer norm beside a loop
of torch's modules: forward and all gradients, in turns.

    .venv/bin/python -m bench.options
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rnnfast
from rnnfast import command_arguments as arguments
from rnnfast.bench.providers.loop import NormedLoop
from rnnfast.bench.timing import speed_up, take_turns
from rnnfast.report import cpu_name, machine

SIZES = ((128, 1, 64), (128, 32, 128), (512, 32, 128), (128, 32, 256), (128, 64, 512))
LOOPS = ("loop: two nn.Linear, nn.LayerNorm, tanh a step", "loop: one nn.Linear out of it")
OPTIONS = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "clipping": {"clip_state_grad": 1.0},
    "record": {"track_gradient_flow": True},
    "record of each sample": {"track_gradient_flow": "sample"},
    "all of them": {"norm": "layer", "clip_state_grad": 1.0, "track_gradient_flow": True},
}


def build(H: int) -> dict[str, nn.Module]:
    """Builds the candidates. The loops have the weights of "layer norm"."""
    torch.manual_seed(0)
    modules = {name: rnnfast.RNN(H, H, backend="cpu", **o) for name, o in OPTIONS.items()}
    loops = {name: NormedLoop(H, at_once) for name, at_once in zip(LOOPS, (False, True))}
    names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    with torch.no_grad():
        for loop in loops.values():
            for theirs, name in zip(loop.parameters(), names):
                theirs.copy_(getattr(modules["layer norm"], f"{name}_l0"))
    return modules | loops


def results(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y, _ = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], g)


def check(modules: dict[str, nn.Module], x: Tensor, g: Tensor) -> None:
    """Loops and kernel must agree within float32 before they are timed."""
    ours = results(modules["layer norm"], x, g)[:2]
    for name in LOOPS:
        for a, b in zip(ours, results(modules[name], x, g)):
            error = (a - b).norm() / b.norm()
            if not error < 1e-4:
                raise RuntimeError(f"the kernel and the {name} differ by {error:.1e}")


def measure(T: int, B: int, H: int, limit: float) -> list[dict[str, object]]:
    modules = build(H)
    x, g = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    check(modules, x, g)
    calls: dict[str, Callable[[], object]] = {
        name: lambda module=module: results(module, x, g) for name, module in modules.items()
    }
    for call in calls.values():
        call()
    samples = take_turns(calls, limit, 7)
    return [
        {
            "T": T,
            "B": B,
            "H": H,
            "what": name,
            "median_s": statistics.median(times),
            "over_plain": speed_up(times, samples["plain"]).median,
            "over_layer_norm": speed_up(times, samples["layer norm"]).median,
        }
        for name, times in samples.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--points", type=arguments.point, nargs="+", metavar="T,B,H", default=SIZES)
    parser.add_argument("--seconds-per-point", type=arguments.seconds, metavar="S", default=8.0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    rows = [row for at in args.points for row in measure(*at, args.seconds_per_point)]
    facts = machine()
    with open(args.out / "cpu_options.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | facts for row in rows)
    table = Table(title=f"forward and all gradients, float32, 2 threads, {cpu_name()}")
    for column in ("T, B, H", "what", "ms", "time / plain", "time / layer norm"):
        table.add_column(column)
    for row in rows:
        size = f"{row['T']}, {row['B']}, {row['H']}"
        times = f"{row['median_s'] * 1e3:.2f}", f"{row['over_plain']:.2f}"
        table.add_row(size, row["what"], *times, f"{row['over_layer_norm']:.2f}")
    Console().print(table)
    print(f"written to {args.out / 'cpu_options.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
