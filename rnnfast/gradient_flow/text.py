"""Gradient flow as text: tables for a terminal, numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .reading import Verdict


def headings(gain_name: str) -> tuple[str, ...]:
    return "layer", "half-life", "horizon", f"mean {gain_name}", "verdict", "because"


def name_of(layer: int, direction: int) -> str:
    return f"{layer}, reverse" if direction else f"{layer}"


def number_of_steps(x: float, longest: float = math.inf) -> str:
    """A number of steps in words. Infinite means longer than ``longest``, the steps that there
    were."""
    if math.isnan(x):
        return "unknown"
    if math.isinf(x):
        return "none" if math.isinf(longest) else f"over {longest:g}"
    return f"{x:.3g}" if x < 1e3 else f"{x:.0f}" if x < 1e6 else f"{x:.0e}"


def rows_of(
    verdicts: Sequence[Sequence[Verdict]],
    half_life: Tensor,
    horizon: Tensor,
    gain: Tensor,
    longest: int,
) -> list[tuple[str, ...]]:
    """A line of the table for each layer and direction.

    Args:
        half_life, horizon: [L, D].
        gain: [L, D, T].
        longest: the steps that a horizon can have.
    """
    return [
        (
            name_of(v.layer, v.direction),
            number_of_steps(half_life[v.layer, v.direction].item()),
            number_of_steps(horizon[v.layer, v.direction].item(), longest),
            f"{gain[v.layer, v.direction].nanmean().item():.2g}",
            v.word,
            v.evidence,
        )
        for layer in verdicts
        for v in layer
    ]


def as_text(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str], gain_name: str) -> str:
    table = [headings(gain_name), *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return "\n".join([title, *lines, *notes])


def as_table(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str], gain_name: str):
    """A rich.console.Group: a table and, below it, the notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    names = headings(gain_name)
    for heading in names:
        table.add_column(heading, justify="right" if heading in names[1:4] else "left")
    for row in rows:
        table.add_row(*row)
    return Group(table, *map(Text, notes))


def to_try(advice: Sequence[str]) -> list[str]:
    return [f"try: {text}" for text in advice]


def plain(x):
    """x as JSON takes it: lists for tensors, None for NaN, "inf" and "-inf"."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, Mapping):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    return x
