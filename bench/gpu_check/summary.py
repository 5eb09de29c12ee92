"""The summary: at most 40 lines of 100 columns, without a path of the machine."""

from __future__ import annotations

import re
import textwrap

LINES, COLUMNS = 40, 100
FINE = ("ok", "skipped", "later")
# Lines of pytest, of Python, and the worst predictions from bench.cuda_plans.
NAMED = ("FAILED ", "ERROR ", "Fatal Python error", "MISS ")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_FOLDERS = re.compile(r"(?<![\w.~])~?(?:/[\w.@+-]+)+/")  # of an absolute path


def succeeded(results: dict) -> bool:
    return all(step["state"] in FINE for step in results["steps"])


def telling(output: str) -> tuple[str, list[str]]:
    """The last line of a step's output, and the lines that name a failure, crash, hang or miss."""
    lines = [_plain(line) for line in re.split(r"[\r\n]+", output)]
    lines = [line for line in lines if line]
    failed = [line for line in lines if line.startswith(NAMED) or "Timeout (" in line]
    return (lines[-1] if lines else "no output"), failed


def render(results: dict) -> str:
    """At most LINES lines of COLUMNS columns."""
    machine = dict(results["machine"])
    head = [f"{results['title']} on {machine.pop('gpu', 'an unknown GPU')}, {results['when'][:16]}"]
    if results["dry_run"]:
        head.append("DRY RUN: stand-ins ran, of which some fail on purpose; nothing was tested")
    facts = ", ".join(f"{k} {v}" for k, v in machine.items())
    head += textwrap.wrap(facts, COLUMNS, max_lines=3, placeholder=" ...")
    steps = results["steps"]
    width = max([4, *(len(step["name"]) for step in steps)])
    head += ["", f"{'step':{width}}  state          s  last word (all of it: <step>.log)"]
    bad = [step["name"] for step in steps if step["state"] not in FINE]
    end = f"{len(steps) - len(bad)} of {len(steps)} steps did not fail, {results['seconds']:.0f} s"
    foot = ["", end]
    if old := earlier(steps):
        foot.insert(1, f"before the sources last changed: {', '.join(old)}")
    room = LINES - len(head) - len(foot)
    # If there are too many lines, those of good steps are dropped first.
    while sum(1 + bool(step["details"]) for step in steps) > room - 1:
        good = [step for step in steps if step["state"] in FINE]
        if not good:
            break
        steps = [step for step in steps if step is not good[-1]]
    steps = steps[: room - 1]
    room -= len(steps)
    if left_out := len(results["steps"]) - len(steps):
        foot.insert(0, f"... and {left_out} more steps in summary.json")
        room -= 1
    body = []
    for i, step in enumerate(steps):
        state, seconds, said = step["state"], step["seconds"], step["said"]
        body.append(f"{step['name']:{width}}  {state:9}  {seconds:5.0f}  {said}")
        waiting = sum(bool(s["details"]) for s in steps[i + 1 :])
        shown = step["details"][: max(0, room - waiting)]
        if len(shown) < len(step["details"]) and shown:
            rest = len(step["details"]) - len(shown) + 1
            shown[-1] = f"... and {rest} more in {step['name']}.log"
        room -= len(shown)
        body += [f"    {line}" for line in shown]
    return "\n".join(_cut(line) for line in [*head, *body, *foot]) + "\n"


def earlier(steps: list[dict]) -> list[str]:
    """The steps that ran on other sources than the first step, which every run repeats."""
    return [s["name"] for s in steps if s.get("sources") != steps[0].get("sources")]


def _plain(line: str) -> str:
    line = re.sub(r"[\x00-\x1f]", " ", _ESCAPES.sub("", line))
    return _FOLDERS.sub("", line).strip(" =")


def _cut(line: str) -> str:
    return (line if len(line) <= COLUMNS else f"{line[: COLUMNS - 3]}...").rstrip()
