"""Measures what this GPU can do, prints tables, writes one JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import report, runner
from .plan import PROGRAMS, QUESTIONS, Measurement, measurements

ROOT = Path(__file__).parents[2]
LEAST_S = 3  # a measurement is not begun with less of the budget left


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything was measured; 1: something failed (it is named); 2: unusable arguments."""
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
    """Runs ``plan`` into ``results``, saving after each process; nothing runs past ``deadline``."""
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
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results",
        metavar="FOLDER",
        help="for the JSON file (default bench/results)",
    )
    parser.add_argument(
        "--only",
        type=questions,
        default=set(QUESTIONS),
        metavar="N,N",
        help="questions: " + "; ".join(f"{n} {text}" for n, text in QUESTIONS.items()),
    )
    parser.add_argument(
        "--budget", type=budget, default=225, metavar="S", help="seconds for all (default 225)"
    )
    parser.add_argument("--nvcc", default="nvcc", help="the compiler (default: nvcc on the PATH)")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "gpu_probe", help="folder of the binaries"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU, no compiler: canned figures, marked so"
    )
    parser.add_argument(
        "--report", type=result_file, metavar="JSON", help="only print the tables of a result file"
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is not a folder")
    if not (args.dry_run or args.report):
        if not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
            parser.error("no NVIDIA GPU here (--dry-run needs none)")
        if not shutil.which(args.nvcc):
            parser.error(f"argument --nvcc: no program {args.nvcc} here (--dry-run needs none)")
    return args


def questions(text: str) -> set[int]:
    chosen = {int(n) if n.isdecimal() else n for n in text.split(",")}
    if not chosen <= set(QUESTIONS):
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted some of 1 to {max(QUESTIONS)}")
    return chosen


def budget(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_S <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted {LEAST_S} to 3600 seconds")
    return seconds


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
    """What the figures depend on. Reads only; a part that does not answer is left out."""
    fields = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    smi = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    facts = dict(zip(("gpu", *fields[1:]), _first_line(smi).split(", ")))
    release = re.search(r"release ([\d.]+)", " ".join(_output([nvcc, "--version"])))
    facts["nvcc"] = release[1] if release else ""
    peers = _first_line([sys.executable, "-m", "bench.gpu_probe.peers", "versions"])
    facts = (json.loads(peers) if peers else {"torch": "does not import"}) | facts
    facts["commit"] = _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return {k: v for k, v in facts.items() if v}


def _output(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _first_line(command: list[str]) -> str:
    return next(iter(_output(command)), "")


def result_path(folder: Path, results: dict) -> Path:
    name = "dry_run" if results["dry_run"] else results["machine"].get("gpu", "unknown")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    when = results["when"][:16].replace(":", "")
    return folder / f"gpu_probe_{slug}_{when}.json"


def write(path: Path, results: dict) -> None:
    """JSON with one figure a line: small, and a difference of two files is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(v)}" for v in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
