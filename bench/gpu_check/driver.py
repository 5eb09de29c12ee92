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

LARGEST = 5_000_000  # bytes of a file that we keep, because results are committed
ENOUGH = 0.9  # of a step's limit; with less time left, the step waits for a later run
VERSIONS = "import json; from rnnfast.report import machine; print(json.dumps(machine('cuda')))"
ENVIRONMENT = {
    "COLUMNS": "100",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "PYTHONFAULTHANDLER": "1",  # prints the stack of a crash
    "PYTHONPATH": str(gpu.ROOT),  # tests the checkout
    "TERM": "dumb",
}


@dataclass(frozen=True)
class Step:
    """One process. In ``command``, "python" is this Python and {out} the folder of the results."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)
    excuse: tuple[str, str] = ("", "")  # (output that makes a failure a skip, reason)
    always: bool = False  # repeats even if an earlier run did it, because later steps need it

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


def check(
    title: str, steps: Sequence[Step], args: argparse.Namespace, resumes: bool | None = None
) -> int:
    """Runs all steps, prints and writes the summary. 0: nothing failed; 1: something did.

    Args:
        resumes: None if there is time for all steps. Otherwise a step that does not fit waits for
            a later run, and all results are packed into one archive. True continues in the folder
            of the last run with steps that failed or wait.
    """
    begin = time.monotonic()
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = [sys.executable, "-c", VERSIONS]
    machine = {"gpu": "none"} if args.dry_run else gpu.machine(versions)
    machine.setdefault("gpu", machine.pop("processor", "unknown"))
    name = "dry run" if args.dry_run else machine["gpu"]
    prefix = f"{gpu.slug(title)}-{gpu.slug(name)}-"
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
    folder = args.out / f"{prefix}{when[:16].replace(':', '')}"
    if resumes and (last := unfinished(prefix, (args.out, gpu.RESULTS), steps)):
        folder, earlier = args.out / last.name, json.loads((last / "summary.json").read_text())
        if last.resolve() != folder.resolve():
            shutil.copytree(last, folder)
        results |= {"when": earlier["when"], "continued": when, "steps": earlier["steps"]}
    folder.mkdir(parents=True, exist_ok=True)
    before = results["seconds"]

    def save() -> None:
        results["seconds"] = round(before + time.monotonic() - begin, 1)
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "summary.txt").write_text(summary.render(results))

    leaves = resumes is not None
    limit = args.budget if leaves else min(args.budget, sum(step.limit_s for step in steps))
    run_all(steps, folder.resolve(), begin + limit, results["steps"], save, leaves)
    print(summary.render(results), end="")
    written = folder
    if leaves:
        written = shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)
    gpu.say(f"written to {written}")
    return 0 if summary.succeeded(results) else 1


def unfinished(prefix: str, places: Sequence[Path], steps: Sequence[Step]) -> Path | None:
    """The newest folder of a run like this one, if it has steps left."""
    found = [f.parent for place in places for f in place.glob(f"{prefix}*/summary.json")]
    if not found:
        return None
    last = max(found, key=lambda folder: folder.name)
    results = json.loads((last / "summary.json").read_text())
    done = {step["name"] for step in results["steps"] if step["state"] == "ok"}
    return None if {step.name for step in steps} <= done else last


def run_all(
    steps: Sequence[Step],
    folder: Path,
    deadline: float,
    results: list[dict],
    save: Callable[[], None],
    leaves: bool = False,
) -> None:
    """Puts each step's result into ``results``, in the order of the table, and saves after each.
    Nothing runs past ``deadline``. A step that is "ok" in ``results`` does not run again, unless
    ``always``.

    A step may use the time that earlier steps left, but not the time of later steps.

    Args:
        leaves: whether a step with much less time than its limit waits for a later run.
    """
    known = {found["name"]: found for found in results}
    todo = [s for s in steps if s.always or known.get(s.name, {}).get("state") != "ok"]
    sources = gpu.sources()
    for number, step in enumerate(todo, 1):
        left = deadline - time.monotonic()
        spare = left - sum(s.limit_s for s in todo[number:])
        if leaves and left < ENOUGH * step.limit_s:
            found = outcome(step, "later", "no time left: a second run goes on with it")
        else:
            found = run_one(step, folder, min(max(step.limit_s, spare), left))
        known[step.name] = found | {"sources": sources}
        results[:] = [known[s.name] for s in steps if s.name in known]
        save()
        gpu.say(f"[{number}/{len(todo)}] {found['name']}: {found['state']}: {found['said']}")


def outcome(
    step: Step, state: str, said: str, why: str = "", seconds: float = 0.0, details: Sequence = ()
) -> dict:
    """The result of a step for the summary."""
    command = shlex.join(step.words("python", "."))
    of_it = {"name": step.name, "command": command, "state": state, "said": said, "why": why}
    return of_it | {"seconds": round(seconds, 1), "details": list(details)}


def run_one(step: Step, folder: Path, limit_s: float) -> dict:
    """Runs a step and returns its entry of the summary. Its output goes to <name>.log."""

    command = step.words(sys.executable, str(folder))
    if not shutil.which(command[0]):
        return outcome(step, "skipped", f"no program {command[0]} here")
    if limit_s < gpu.LEAST_S:
        return outcome(step, "not begun", "the time for all of them is spent")
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
    return outcome(step, state, said, done.why, done.seconds, details)


def remove_large(folder: Path) -> list[tuple[str, int]]:
    files = [(f, f.stat().st_size) for f in folder.rglob("*") if f.is_file()]
    large = [(f, size) for f, size in files if size > LARGEST]
    for f, _ in large:
        f.unlink()
    return [(str(f.relative_to(folder)), size) for f, size in large]
