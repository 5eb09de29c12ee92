"""What a run has found, as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ..testing import Verdict
from .rows import RECORD, Row
from .sequences import Comparison

LEGEND = """\
steps: the largest error of a single value over what its time step, taken again in float64, may err
by; at [t, b, unit]. sequences: RMS error against float64 at the worst time step, over torch's. torch
is nn.RNN, and where it has no kernel an eager loop; both errors beside it. record: of what backward
measures of the gradient, [direction, t, b]. Allowed are 1, 1.25 and 1."""
COMPLAINTS = 20  # printed, at most; validate.json has all


def table(rows: Sequence[Row], machine: dict) -> Table:
    title = "{device}, {threads} threads, torch {torch}".format(**machine)
    found = Table(title=f"Kernels against float64: {title}", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, right in (
        ("backend", False),
        ("norm", False),
        ("case", False),
        ("steps", False),
        ("sequences", False),
        ("ours / torch's", False),
        ("record", False),
        ("", False),
    ):
        found.add_column(heading, justify="right" if right else "left", no_wrap=True)
    before = None
    for row in rows:
        kind = row.backend, row.dtype
        if before not in (None, kind):
            found.add_section()
        found.add_row(*_cells(row, first=kind != before))
        before = kind
    return found


def _cells(row: Row, first: bool) -> list[str | Text]:
    style = {"FAILED": "bold red", "pass": "green"}.get(row.word, "")
    return [
        f"{row.backend} {row.dtype}" if first else "",
        "" if row.norm == "none" else row.norm,
        row.group,
        _of_verdict(row.steps),
        *_of_comparison(row.sequence),
        _of_verdict(row.record),
        Text(row.word, style=style),
    ]


def _of_verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    where = ", ".join(map(str, verdict.index))
    # escaped, as rich has a use for brackets of its own
    return f"{_ratio(verdict.ratio)} {verdict.name.removeprefix(RECORD)}\\[{where}]"


def _of_comparison(found: Comparison | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    at = f"\\[{found.ours.t}]" if found.over_time else ""
    return (
        f"{_ratio(found.ratio)} {found.name}{at}",
        f"{found.ours.rms:.1e} / {found.theirs.rms:.1e}",
    )


def _ratio(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.0e}"


def summary(rows: Sequence[Row], result: dict) -> list[str]:
    """What was left out and what is wrong, and last all of it in a sentence."""
    lines = [f"left out: {name}: {why}" for name, why in result["left_out"].items()]
    reasons = dict.fromkeys(f"{r.name}: {r.left_out}" for r in rows if r.left_out)
    lines += [f"left out: {reason}" for reason in reasons]
    failed = [row for row in rows if row.word == "FAILED"]
    complaints = [f"{row.name}: {text}" for row in failed for text in row.complaints]
    lines += complaints[:COMPLAINTS]
    if len(complaints) > COMPLAINTS:
        lines.append(f"and {len(complaints) - COMPLAINTS} more, in validate.json")
    names = ", ".join(dict.fromkeys(row.backend for row in rows))
    judged = sum(row.cases for row in rows)
    if not failed:
        return [*lines, f"{names}: every budget is kept, in {len(rows)} rows of {judged} cases."]
    said = f"{names}: a budget is broken in {len(failed)} of {len(rows)} rows ({judged} cases): "
    return [*lines, said + "; ".join(row.name for row in failed) + "."]
