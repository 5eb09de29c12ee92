"""Gradient flow as text: tables for a terminal, numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

HEADINGS = ("layer", "half-life", "horizon", "mean |f'|", "verdict", "because")


def name_of(layer: int, direction: int) -> str:
    return f"{layer}, reverse" if direction else f"{layer}"


def number_of_steps(x: float, longest: float = math.inf) -> str:
    """As one says it; what is longer than ``longest`` was not seen."""
    if math.isnan(x):
        return "unknown"
    if math.isinf(x):
        return "none" if math.isinf(longest) else f"over {longest:g}"
    return f"{x:.3g}" if x < 1e3 else f"{x:.0f}" if x < 1e6 else f"{x:.0e}"


def as_text(title: str, rows: Sequence[Sequence[str]], advice: Sequence[str]) -> str:
    table = [HEADINGS, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [title]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    lines += [f"try: {text}" for text in advice]
    return "\n".join(lines)


def as_table(title: str, rows: Sequence[Sequence[str]], advice: Sequence[str]):
    """A rich.table.Table."""
    from rich.table import Table

    caption = "\n".join(f"try: {text}" for text in advice) or None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[1:4] else "left")
    for row in rows:
        table.add_row(*row)
    return table


def plain(x):
    """As JSON has it: lists for tensors, None for NaN, "inf" and "-inf"."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, Mapping):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    return x
