"""The results of a run, as a table and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..testing import Verdict
from .rows import RECORD, Row
from .sequences import Comparison

LEGEND = """\
steps: the largest error of a value over its allowed error, at [t,b,unit]; each time step starts
from the kernel's own step before. sequences: RMS error against float64 over torch's, at the worst
time step; torch is its own module, or an eager loop where that lacks the option. record: the
largest error of the gradient record over its allowed error. Limits: 1, 1.25 and 1."""
COMPLAINTS = 2  # printed for a row; validate.json has all


def table(rows: Sequence[Row], machine: dict) -> Table:
    title = "{processor}, {threads} threads, torch {torch}".format(**machine)
    title = f"Kernels against float64: {title}"
    found = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ["backend", "cell", "norm", "case", "steps", "sequences", "ours", "torch's"]
    headings += ["record", ""]
    for heading in headings:
        found.add_column(heading, no_wrap=True)
    for row, of_section in _numbered(rows):
        if of_section == 0:
            found.add_section()
        first = (row.backend, row.dtype)[of_section] if of_section < 2 else ""
        found.add_row(first, *_cells(row))
    return found


def _numbered(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Each row with its number among the rows of its backend and dtype."""
    for _, section in groupby(rows, key=lambda row: (row.backend, row.dtype)):
        yield from ((row, i) for i, row in enumerate(section))


def _cells(row: Row) -> list[str | Text]:
    style = {"FAILED": "bold red", "pass": "green"}.get(row.word, "")
    record = row.record and f"{_ratio(row.record.ratio)} {row.record.name.removeprefix(RECORD)}"
    return [
        row.cell,
        "" if row.norm == "none" else row.norm,
        row.group,
        _of_verdict(row.steps),
        *_of_comparison(row.sequence),
        record or "",
        Text(row.word, style=style),
    ]


def _of_verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    where = ",".join(map(str, verdict.index))
    return f"{_ratio(verdict.ratio)} {verdict.name}" + escape(f"[{where}]")


def _of_comparison(found: Comparison | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    at = f"[{found.ours.t}]" if found.over_time else ""
    said = f"{_ratio(found.ratio)} {found.name}" + escape(at)
    return said, f"{found.ours.rms:.1e}", f"{found.theirs.rms:.1e}"


def _ratio(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.0e}"


def summary(rows: Sequence[Row], result: dict) -> list[str]:
    """Lines: what was left out, what is wrong, and last a sentence about the whole run."""
    lines = [f"left out: {name}: {why}" for name, why in result["left_out"].items()]
    reasons = dict.fromkeys(
        f"{row.backend if row.cases else row.name}: {row.left_out}" for row in rows if row.left_out
    )
    lines += [f"left out: {reason}" for reason in reasons]
    failed = [row for row in rows if row.word == "FAILED"]
    for row in failed:
        lines += [f"{row.name}: {text}" for text in row.complaints[:COMPLAINTS]]
        if more := row.complaints[COMPLAINTS:]:
            lines.append(f"{row.name}: and {len(more)} more, in validate.json")
    names = ", ".join(dict.fromkeys(row.backend for row in rows))
    judged = sum(row.cases for row in rows)
    if not failed:
        return [*lines, f"{names}: every budget is kept, in {len(rows)} rows of {judged} cases."]
    said = f"{names}: a budget is broken in {len(failed)} of {len(rows)} rows ({judged} cases): "
    return [*lines, said + "; ".join(row.name for row in failed) + "."]
