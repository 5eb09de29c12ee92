"""Finds what got slower from one result file to another, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .rows import FormatError, Row, read_csv

LEAST = 0.03  # a smaller change counts as none, even on a quiet machine


@dataclass(frozen=True)
class Change:
    """A ratio of times, old / new. Above 1 the new one is faster."""

    row: Row
    ratio: float
    beyond_noise: bool
    by: str  # "torch": both relative to torch in their own run; "time"

    @property
    def slower(self) -> bool:
        return self.beyond_noise and self.ratio < 1


def changes(old: Sequence[Row], new: Sequence[Row], same_machine: bool) -> list[Change]:
    """The changes of the rows that both files have, without other providers.

    If torch ran in both, a time is relative to torch in the same run, which does not depend on the
    machine. Otherwise it compares times, which is valid on the same machine only.
    """
    before = {_key(row): row for row in old}
    found = []
    for row in new:
        was = before.get(_key(row))
        if was is None or row.provider == "torch":
            continue
        if row.over_torch and was.over_torch:
            ratio = row.over_torch / was.over_torch
            apart = (
                row.over_torch_p90 < was.over_torch_p10 or row.over_torch_p10 > was.over_torch_p90
            )
            by = "torch"
        elif same_machine:
            ratio = was.median_s / row.median_s
            apart = row.p10_s > was.p90_s or row.p90_s < was.p10_s
            by = "time"
        else:
            continue
        found.append(Change(row, ratio, apart and abs(ratio - 1) >= LEAST, by))
    return found


def _key(row: Row) -> tuple:
    return row.work, row.what, row.provider, row.threads


def compare(old: Path, new: Path) -> tuple[Table, list[str], bool]:
    """A table of the changes, lines to print, and whether anything got slower.

    Raises:
        FormatError: a file cannot be read, or the two have no row in common.
    """
    (before, then), (after, now) = read_csv(old), read_csv(new)
    same = all(then.get(name) == now.get(name) for name in ("processor", "simd"))
    found = changes(before, after, same)
    if not found:
        raise FormatError(f"{old} and {new} have no row that can be compared")
    moved = sorted((c for c in found if c.beyond_noise), key=lambda c: c.ratio)
    table = Table(title="old time / new time, beyond the noise of both")
    for head in ("T, B, H", "what", "who", "old / new", "measured by"):
        table.add_column(head)
    for c in moved:
        cells = f"{c.ratio:.2f}x", "time over torch's" if c.by == "torch" else "time"
        table.add_row(str(c.row.work), c.row.what, c.row.provider, *cells)
    slower = sum(c.slower for c in moved)
    lines = [f"{name}: {_facts(facts)}" for name, facts in (("old", then), ("new", now))]
    faster = len(moved) - slower
    lines.append(f"{slower} slower, {faster} faster, {len(found) - len(moved)} within the noise")
    return table, lines, slower > 0


def _facts(facts: dict[str, str]) -> str:
    return ", ".join(v for k, v in facts.items() if k in ("processor", "simd", "commit", "date"))
