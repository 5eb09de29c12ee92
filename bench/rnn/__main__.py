"""Times rnnfast.RNN and its peers in turns, each judged before; writes one CSV and one picture."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import rnnfast
from rnnfast.backends import cpu
from rnnfast.report import cpu_name

from . import picture, points, report
from .points import BOTH, Point
from .providers import PROVIDERS, Provider
from .runner import measure, thread_scaling
from .timing import speed_up

ROOT = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None, providers: Sequence[Provider] = PROVIDERS) -> int:
    """0: measured, whatever came out; 1: a provider was wrong or raised; 2: unusable arguments."""
    args = parse(argv, providers)
    machine = versions()
    torch.set_num_threads(args.threads)
    chosen = []
    for provider in args.providers:
        why = provider.unavailable()
        if why:
            say(f"{provider.name} is left out: {why}")
        else:
            chosen.append(provider)
    failures: list[str] = []
    effort = (args.seconds_per_point, 3 if args.quick else 7, failures)
    measured = measure(args.todo, chosen, *effort)
    scaling = None
    for provider in chosen:
        if args.whole and provider.name == "rnnfast":
            pair = thread_scaling(provider, *effort)
            if pair:
                scaling = speed_up(*(m.samples[BOTH]["rnnfast"] for m in pair))
            measured += pair
    show(args, machine, [row for m in measured for row in report.rows(m)], scaling)
    for failure in failures:
        say(f"FAILED: {failure}")
    return 1 if failures else 0


def show(
    args: argparse.Namespace,
    machine: dict[str, str],
    rows: Sequence[report.Row],
    scaling: float | None,
) -> None:
    """Files first: they are kept whatever becomes of the screen."""
    where = f"{machine['cpu']}, float32, {args.threads} thread{'s' if args.threads > 1 else ''}"
    report.write_csv(rows, machine, args.out / "cpu.csv")
    written = ["cpu.csv"]
    if any(row.kind == "sweep" for row in rows):
        picture.draw(rows, where, args.out / "cpu.png")
        written.append("cpu.png")
    console = Console(width=max(130, Console().width))  # of the table, on any screen
    console.print(report.table(rows, where))
    lines = report.summary(rows, scaling)
    if args.threads != 2:
        lines.append("The targets are meant for 2 threads.")
    for line in [*lines, f"written to {args.out}: {', '.join(written)}"]:
        console.print(line, highlight=False)


def parse(argv: Sequence[str] | None, providers: Sequence[Provider]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rnn", description=__doc__)
    parser.add_argument(
        "--out",
        type=folder,
        metavar="FOLDER",
        help="for cpu.csv and cpu.png (default: bench/results, build/bench for a part of the run)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few small points, to see that everything works"
    )
    parser.add_argument(
        "--points", type=point, nargs="+", metavar="T,B,H", help="these only, I = H (no picture)"
    )
    names = {provider.name: provider for provider in providers}
    parser.add_argument(
        "--providers", nargs="+", choices=names, default=list(names), help="default: all"
    )
    parser.add_argument(
        "--seconds-per-point", type=seconds, metavar="S", help="default 2.5, with --quick 0.1"
    )
    parser.add_argument("--threads", type=count, default=2, metavar="N", help="default 2")
    args = parser.parse_args(argv)
    args.whole = not (args.quick or args.points or len(args.providers) < len(names))
    args.todo = args.points or (points.quick() if args.quick else points.everything())
    args.out = args.out or folder(str(ROOT / ("bench/results" if args.whole else "build/bench")))
    args.providers = [names[name] for name in names if name in args.providers]
    args.seconds_per_point = args.seconds_per_point or (0.1 if args.quick else 2.5)
    return args


def folder(text: str) -> Path:
    """One that can be written to: this is asked before minutes of measuring, not after."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        why = error.strerror
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {why}") from None
    return path


def point(text: str) -> Point:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted T,B,H, each 1 or more")
    kind = "listed" if tuple(sizes) in points.LISTED else "asked for"
    return Point(*sizes, kind)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted more than 0, up to 600")
    return value


def count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted 1 or more")
    return int(text)


def versions() -> dict[str, str]:
    """What the figures depend on beside the point: columns of every line."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = ""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "cpu": cpu_name(),
        "simd": cpu._C.simd_level() if cpu._C else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": jax,
        "rnnfast": rnnfast.__version__,
        "commit": f"{commit}+changes" if changed else commit,
        "date": datetime.date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    """What it prints; nothing where git or its repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
