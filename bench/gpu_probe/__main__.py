"""Measures what this GPU can do, prints tables, writes one JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import gpu
from ..gpu import LEAST_S, ROOT, add_arguments, check_arguments, say
from . import report, runner
from .plan import PROGRAMS, QUESTIONS, Measurement, measurements


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything was measured; 1: something failed, by name; 2: unusable arguments."""
    args = parse(argv)
    if args.report:
        print(report.render(args.report), end="")
        return 0
    begin = time.monotonic()
    plan = [m for m in measurements() if m.question in args.only]
    results = {
        "schema": 1,
        "dry_run": args.dry_run,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"gpu": "none: canned figures"} if args.dry_run else machine(args.nvcc),
        "measurements": [],
        "figures": [],
        "failures": [],
    }
    path = result_path(args.out, results)
    if args.dry_run:
        broken = {}
        command = canned_command
    else:
        programs = [p for p in PROGRAMS if any(m.program == p for m in plan)]
        say(f"compiling {len(programs)} probes")
        broken = runner.build(programs, args.build, args.nvcc)
        command = command_in(args.build)
    measure(plan, command, broken, begin + args.budget, results, lambda: write(path, results))
    print(report.render(results))
    say(f"{time.monotonic() - begin:.0f} s; written to {path}")
    return 1 if results["failures"] else 0


def measure(
    plan: Sequence[Measurement],
    command: Callable[[Measurement], list[str]],
    broken: dict[str, str],
    deadline: float,
    results: dict,
    save: Callable[[], None],
) -> None:
    """Runs ``plan`` into ``results``, saving after each process. Nothing runs past ``deadline``."""
    for number, m in enumerate(plan, 1):
        left = deadline - time.monotonic()
        if m.program in broken:
            outcome = runner.Outcome(failures=[broken[m.program]])
        elif left < LEAST_S:
            outcome = runner.Outcome(failures=["not begun: the time for all of them is spent"])
        else:
            outcome = runner.run(command(m), min(m.limit_s, left))
        results["figures"] += [{"question": m.question, **f} for f in outcome.figures]
        results["failures"] += [{"measurement": m.name, "why": why} for why in outcome.failures]
        results["measurements"].append(
            {"name": m.name, "seconds": round(outcome.seconds, 2), "ok": not outcome.failures}
        )
        save()
        state = "; ".join(outcome.failures) or f"{len(outcome.figures)} figures"
        say(f"[{number}/{len(plan)}] {m.name}: {state} ({outcome.seconds:.1f} s)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_probe", description=__doc__)
    add_arguments(parser, 225, "the JSON file")
    parser.add_argument(
        "--only",
        type=questions,
        default=set(QUESTIONS),
        metavar="N,N",
        help="questions: " + "; ".join(f"{n} {text}" for n, text in QUESTIONS.items()),
    )
    parser.add_argument("--nvcc", default="nvcc", help="the compiler (default: nvcc on the PATH)")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "gpu_probe", help="folder of the binaries"
    )
    parser.add_argument(
        "--report", type=result_file, metavar="JSON", help="only print the tables of a result file"
    )
    args = parser.parse_args(argv)
    if args.report:
        return args
    check_arguments(parser, args)
    if not args.dry_run and not shutil.which(args.nvcc):
        parser.error(f"argument --nvcc: no program {args.nvcc} here (--dry-run needs none)")
    return args


def questions(text: str) -> set[int]:
    chosen = {int(n) if n.isdecimal() else n for n in text.split(",")}
    if not chosen <= set(QUESTIONS):
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted some of 1 to {max(QUESTIONS)}")
    return chosen


def result_file(text: str) -> dict:
    try:
        results = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise argparse.ArgumentTypeError(f"{text} is no result of this program")
    return results


def command_in(build: Path) -> Callable[[Measurement], list[str]]:
    def command(m: Measurement) -> list[str]:
        if m.program == "peers":
            return [sys.executable, "-m", "bench.gpu_probe.peers", *m.arguments]
        return [str(build / m.program), *m.arguments]

    return command


def canned_command(m: Measurement) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_probe.canned", m.name]


def machine(nvcc: str) -> dict[str, str]:
    facts = gpu.machine([sys.executable, "-m", "bench.gpu_probe.peers", "versions"], nvcc)
    commit = gpu.first_line(["git", "describe", "--always", "--dirty"])
    return facts | ({"commit": commit} if commit else {})


def result_path(folder: Path, results: dict) -> Path:
    name = "dry_run" if results["dry_run"] else results["machine"].get("gpu", "unknown")
    when = results["when"][:16].replace(":", "")
    return folder / f"gpu_probe_{gpu.slug(name)}_{when}.json"


def write(path: Path, results: dict) -> None:
    """Writes JSON with one figure a line, so that the difference of two files is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(v)}" for v in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
