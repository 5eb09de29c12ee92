"""Runs a table of steps, each a process under a limit, into one folder."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import gpu
from . import summary

LARGEST = 5_000_000  # bytes of a file that is kept: results are committed
VERSIONS = "import json; from rnnfast.report import machine; print(json.dumps(machine('cuda')))"
ENVIRONMENT = {
    "COLUMNS": "100",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "PYTHONFAULTHANDLER": "1",  # a crash says where
    "PYTHONPATH": str(gpu.ROOT),  # the checkout is what is tested
    "TERM": "dumb",
}


@dataclass(frozen=True)
class Step:
    """One process. In ``command``, "python" is this Python and {out} the folder of the results."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)
    excuse: tuple[str, str] = ("", "")  # output that makes a failure a skip, and what that means

    def words(self, python: str, out: str) -> list[str]:
        words = [python if word == "python" else word for word in self.command]
        return [word.replace("{out}", out) for word in words]


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, budget_s: float
) -> argparse.Namespace:
    gpu.add_arguments(parser, budget_s, "the folder of the results")
    args = parser.parse_args(argv)
    gpu.check_arguments(parser, args)
    return args


def check(title: str, steps: Sequence[Step], args: argparse.Namespace) -> int:
    """Runs all, prints and writes the summary; 0: nothing failed; 1: something did."""
    begin = time.monotonic()
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = [sys.executable, "-c", VERSIONS]
    machine = {"gpu": "none"} if args.dry_run else gpu.machine(versions)
    machine.setdefault("gpu", machine.pop("processor", "unknown"))
    name = "dry run" if args.dry_run else machine["gpu"]
    folder = args.out / f"{gpu.slug(title)}-{gpu.slug(name)}-{when[:16].replace(':', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "schema": 1,
        "title": title,
        "dry_run": args.dry_run,
        "when": when,
        "machine": machine,
        "budget_s": args.budget,
        "seconds": 0.0,
        "steps": [],
    }

    def save() -> None:
        results["seconds"] = round(time.monotonic() - begin, 1)
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "summary.txt").write_text(summary.render(results))

    deadline = begin + min(args.budget, sum(step.limit_s for step in steps))
    run_all(steps, folder.resolve(), deadline, results["steps"], save)
    print(summary.render(results), end="")
    gpu.say(f"written to {folder}")
    return 0 if summary.succeeded(results) else 1


def run_all(
    steps: Sequence[Step],
    folder: Path,
    deadline: float,
    results: list[dict],
    save: Callable[[], None],
) -> None:
    """Appends to ``results``, saving after each step; nothing runs past ``deadline``.

    What steps leave of their limits, a later one may take: it is cut where those after it would
    lose theirs.
    """
    for number, step in enumerate(steps, 1):
        left = deadline - time.monotonic()
        spare = left - sum(s.limit_s for s in steps[number:])
        found = run_one(step, folder, min(max(step.limit_s, spare), left))
        results.append(found)
        save()
        gpu.say(f"[{number}/{len(steps)}] {found['name']}: {found['state']}: {found['said']}")


def run_one(step: Step, folder: Path, limit_s: float) -> dict:
    """What the summary tells of it; its output goes to <name>.log."""

    def found(state: str, said: str, why: str = "", seconds: float = 0.0, details=()) -> dict:
        command = shlex.join(step.words("python", "."))
        of_it = {"name": step.name, "command": command, "state": state, "said": said, "why": why}
        return of_it | {"seconds": round(seconds, 1), "details": list(details)}

    command = step.words(sys.executable, str(folder))
    if not shutil.which(command[0]):
        return found("skipped", f"no program {command[0]} here")
    if limit_s < gpu.LEAST_S:
        return found("not begun", "the time for all of them is spent")
    done = gpu.run(command, limit_s, merge=True, env=ENVIRONMENT | dict(step.env))
    text = done.out.replace(str(folder), ".").replace(str(gpu.ROOT), ".")
    (folder / f"{step.name}.log").write_text(text)
    said, details = summary.telling(text)
    state = "timed out" if done.timed_out else "failed" if done.why else "ok"
    needle, meaning = step.excuse
    if needle and needle in text:
        state, said = "skipped", meaning
    elif done.why and not done.why.startswith("exit"):
        said = f"{done.why}; last: {said}"
    details += [f"removed: {name} had {size / 1e6:.0f} MB" for name, size in remove_large(folder)]
    return found(state, said, done.why, done.seconds, details)


def remove_large(folder: Path) -> list[tuple[str, int]]:
    files = [(f, f.stat().st_size) for f in folder.rglob("*") if f.is_file()]
    large = [(f, size) for f, size in files if size > LARGEST]
    for f, _ in large:
        f.unlink()
    return [(str(f.relative_to(folder)), size) for f, size in large]
