"""Prints the measurements: a line for each workload, and which targets were reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from . import points
from .rows import Row
from .workload import BOTH, FORWARD, WAYS, Workload


class Target(NamedTuple):
    name: str
    found: float
    wanted: float
    form: str = "{:.2f}x"

    @property
    def reached(self) -> bool:
        return self.found >= self.wanted

    def __str__(self) -> str:
        return f"{self.name}: {self.form} of {self.form}".format(self.found, self.wanted)


def targets(row: Row) -> list[Target]:
    """The targets of this row, if it is ours and forward and backward."""
    if not row.ours or row.what != BOTH:
        return []
    at, wanted = str(row.work), []
    if row.device != "cpu":
        at = f"{row.provider} at {at}"
    if row.target_over_torch and row.over_torch:
        wanted.append(Target(f"{at} over torch", row.over_torch, row.target_over_torch))
    if row.over_jax:
        wanted.append(Target(f"{at} over jax", row.over_jax, points.OVER_JAX))
    if row.cell == "lstm" and not row.packed and 128 <= row.H <= 512 and row.floor_share:
        ratio, share = points.OVER_LSTM_OR_GEMM
        best = max((row.over_torch or 0) / ratio, row.floor_share / share)
        name = f"{at} over torch by {ratio:g}x, or share of GEMM by {share:.0%}"
        wanted.append(Target(name, best, 1.0))
    large = row.H >= points.GEMM_SHARE_H and row.B >= points.GEMM_SHARE_B
    if row.device == "cpu" and large and row.work.plain and row.floor_share:
        share = Target(f"{at} share of GEMM", row.floor_share, points.GEMM_SHARE, "{:.0%}")
        wanted.append(share)
    return wanted


def summary(found: Sequence[Row], scaling: Mapping[str, float]) -> list[str]:
    """Lines that say which targets were reached and which were missed."""
    wanted = [target for row in found for target in targets(row)]
    at = Workload(*points.SCALING_POINT)
    wanted += [Target(f"{at}, 1 thread to 2", x, points.SCALING) for x in scaling.values()]
    missed = [target for target in wanted if not target.reached]
    lines = [f"{len(wanted) - len(missed)} of {len(wanted)} targets reached"]
    if missed:
        lines += ["Missed, as measured and as wanted:", *(f"  {target}" for target in missed)]
    over_jax = [target.found for target in wanted if target.name.endswith("over jax")]
    if over_jax:
        aim = points.AIM_OVER_JAX
        there = sum(x >= aim for x in over_jax)
        lines.append(f"At least {aim:g}x as fast as jax (an aim): {there} of {len(over_jax)}")
    return lines


def table(found: Sequence[Row], title: str) -> Table:
    """A line for each workload and provider. Empty columns are left out."""
    table = Table(title=title, caption=CAPTION, caption_justify="left")
    table.add_column("T, B, H", overflow="fold")
    table.add_column("who: how", overflow="fold", max_width=30)
    by_work: dict[Workload, dict[str, dict[str, Row]]] = {}
    for row in found:
        if row.kind != "threads":
            by_work.setdefault(row.work, {}).setdefault(row.provider, {})[row.what] = row
    filled = {head for who in by_work.values() for ways in who.values() for head in _cells(ways)}
    heads = [head for head in HEADS if head in filled]
    for head in heads:
        table.add_column(head, justify="right")
    kind = ""
    for work, providers in by_work.items():
        if kind and work.kind != kind:
            table.add_section()
        kind = work.kind
        for i, (name, ways) in enumerate(providers.items()):
            how = next(iter(ways.values())).how
            cells = _cells(ways)
            who = f"{name}: {how}" if how else name
            table.add_row("" if i else str(work), who, *(cells.get(head, "") for head in heads))
    return table


TIMES = dict(zip(WAYS, ("forward", "f+b ms", "step", "graph")))
HEADS = (*TIMES.values(), "us/step", "forward\nus/step", "estimate", "GFLOP/s", "of\nfloor")
HEADS += ("over\ntorch", "target", "over\njax", "kept kB")
CAPTION = """\
forward, f+b, step, graph: median milliseconds of forward, of forward+backward, of a training step,
and of forward+backward as a CUDA graph. The rest is of forward+backward. us/step: a time step.
forward us/step, estimate: on a GPU, that of forward, and what the launch plan expects of the
recurrence in it. of floor: the least time that this machine can need, over the time
(rnnfast/bench/floors.py). over: their time / this one's, median over the rounds. kept: for
backward, beyond input, parameters and outputs. ✕: below its target, which over jax is 1x."""


def _cells(ways: Mapping[str, Row]) -> dict[str, str]:
    """{column: text}, without empty texts."""
    cells = {head: f"{1e3 * ways[w].median_s:.3g}" for w, head in TIMES.items() if w in ways}
    forward, both = ways.get(FORWARD), ways.get(BOTH)
    if forward and forward.estimated_us_per_step is not None:
        cells["forward\nus/step"] = f"{forward.us_per_step:.3g}"
        cells["estimate"] = f"{forward.estimated_us_per_step:.3g}"
    if both is None:
        return cells
    missed = {t.name.rpartition(" over ")[2] for t in targets(both) if not t.reached}
    cells |= {
        "us/step": f"{both.us_per_step:.3g}",
        "GFLOP/s": f"{both.gflops:.3g}",
        "of\nfloor": "" if both.floor_share is None else f"{both.floor_share:.0%}",
        "over\ntorch": _times(both.over_torch, "torch" in missed),
        "target": _times(both.target_over_torch),
        "over\njax": _times(both.over_jax, "jax" in missed),
        "kept kB": "" if both.saved_bytes is None else f"{both.saved_bytes / 1e3:,.0f}",
    }
    return {head: text for head, text in cells.items() if text}


def _times(ratio: float | None, missed: bool = False) -> str:
    text = "" if ratio is None else f"{ratio:.2f}x"
    return f"[bold red]{text} ✕[/]" if missed else text
