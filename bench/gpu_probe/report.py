"""Prints the figures as Markdown tables that are also readable on a screen."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import QUESTIONS, TABLES, Table, estimate


def render(results: dict) -> str:
    """The whole report of one result file (its JSON, loaded)."""
    machine = results["machine"]
    title = f"GPU probe: {machine.get('gpu', 'unknown GPU')}, {results['when'][:10]}"
    parts = [f"# {title}"]
    if results["dry_run"]:
        parts.append("**Dry run: canned figures. Nothing here was measured.**")
    parts.append("\n".join(f"- {k}: {v}" for k, v in machine.items()))
    clock = [f["value"] for f in results["figures"] if f["figure"] == "sm_clock"]
    if clock:
        parts.append(
            f"SM clock {min(clock):.0f} to {max(clock):.0f} MHz over {len(clock)} processes; "
            "ns below are at the median of it."
        )
    mhz = sorted(clock)[len(clock) // 2] if clock else None
    for question, text in QUESTIONS.items():
        mine = [f for f in results["figures"] if f["question"] == question]
        tables = [
            _table(t, [f for f in mine if f["figure"] == t.figure], mhz) for t in TABLES[question]
        ]
        parts += [f"## {question}. {text}", *(filter(None, tables) if mine else ["(no figure)"])]
    if results["failures"]:
        rows = [[f["measurement"], f["why"]] for f in results["failures"]]
        parts += ["## What failed", _markdown(["measurement", "why"], rows)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, figures: Sequence[dict], mhz: float | None) -> str:
    """One table: a row for each set of other parameters, a column for each value of ``across``."""
    if not figures:
        return ""
    rows: dict[tuple, dict[tuple, dict]] = {}
    for f in figures:
        params = f["params"]
        row = tuple((k, v) for k, v in params.items() if k not in table.across)
        column = tuple(params.get(k, "") for k in table.across)
        rows.setdefault(row, {})[column] = f
    columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
    keys = list(dict.fromkeys(k for row in rows for k, _ in row))
    heads = ["value"] if columns == [()] else [_head(table.across, c) for c in columns]
    body = []
    for row, cells in rows.items():
        params = dict(row)
        expected = next(
            (e for c in cells.values() if (e := estimate(table.figure, c["params"]))), ""
        )
        body.append(
            [str(params.get(k, "")) for k in keys]
            + [_cell(cells.get(c), alone=len(columns) == 1, mhz=mhz) for c in columns]
            + [expected]
        )
    unit = figures[0]["unit"]
    return f"{table.title} [{unit}]\n\n" + _markdown([*keys, *heads, "expected"], body)


def _head(names: Sequence[str], values: tuple) -> str:
    return " ".join(
        f"{n} {v}" if isinstance(v, int) else str(v) or "-" for n, v in zip(names, values)
    )


def _cell(figure: dict | None, alone: bool, mhz: float | None) -> str:
    if figure is None:
        return ""
    text = _number(figure["value"])
    if alone and "low" in figure:
        text += f" ({_number(figure['low'])} to {_number(figure['high'])})"
    if alone and figure["unit"] == "cycles" and mhz:
        text += f" = {figure['value'] / mhz * 1e3:.0f} ns"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |"

    return "\n".join([line(heads), line(["-" * w for w in widths]), *map(line, rows)])
