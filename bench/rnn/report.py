"""From samples to rows, a CSV file, a table and the list of targets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from . import points
from .points import BOTH, FORWARD, Point
from .timing import quantiles, speed_up


@dataclass
class Measured:
    """All that was measured at one point."""

    point: Point
    samples: dict[str, dict[str, list[float]]]  # {what: {provider: seconds of each round}}
    saved_bytes: dict[str, int | None]
    threads: int
    gemm_gflops: float | None = None  # just before and after


@dataclass(frozen=True)
class Row:
    """A line of the CSV file, which adds what all lines have in common."""

    kind: str
    T: int
    B: int
    H: int
    what: str
    provider: str
    threads: int
    median_s: float
    p10_s: float
    p90_s: float
    rounds: int
    gflops: float
    gemm_gflops: float | None
    gemm_share: float | None
    over_torch: float | None  # time of torch / time of this provider, median over the rounds
    over_jax: float | None
    target_over_torch: float | None
    saved_bytes: int | None


def rows(measured: Measured) -> list[Row]:
    point, found = measured.point, []
    for what, samples in measured.samples.items():
        for provider, seconds in samples.items():
            time = quantiles(seconds)
            gflops = point.flops(what) / time.median / 1e9
            over = {p: speed_up(samples[p], seconds) for p in ("torch", "jax") if p in samples}
            gemm = measured.gemm_gflops
            judged = (provider, what) == ("rnnfast", BOTH) and "torch" in over
            found.append(
                Row(
                    *(point.kind, *point[:3], what, provider, measured.threads),
                    *(*time, len(seconds)),
                    *(gflops, gemm, gemm and gflops / gemm),
                    *(over.get("torch"), over.get("jax"), point.target if judged else None),
                    measured.saved_bytes.get(provider),
                )
            )
    return found


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
    """What this row has to show: rnnfast, forward and backward."""
    if (row.provider, row.what) != ("rnnfast", BOTH):
        return []
    at, wanted = f"({row.T}, {row.B}, {row.H})", []
    if row.target_over_torch:
        wanted.append(Target(f"{at} over torch", row.over_torch, row.target_over_torch))
    if row.over_jax:
        wanted.append(Target(f"{at} over jax", row.over_jax, points.OVER_JAX))
    if row.gemm_share and row.H >= points.GEMM_SHARE_H and row.B >= points.GEMM_SHARE_B:
        share = Target(f"{at} share of GEMM", row.gemm_share, points.GEMM_SHARE, "{:.0%}")
        wanted.append(share)
    return wanted


def summary(found: Sequence[Row], scaling: float | None) -> list[str]:
    """Which targets were reached, and which were not, one a line."""
    wanted = [target for row in found for target in targets(row)]
    if scaling:
        name = f"{points.SCALING_POINT}, 1 thread to 2"
        wanted.append(Target(name, scaling, points.SCALING))
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
    """A line for each point: times of forward+backward, and what they say of rnnfast."""
    by_point: dict[tuple, dict[tuple[str, str], Row]] = {}
    for row in found:
        if row.kind != "threads":
            cells = by_point.setdefault((row.kind, row.T, row.B, row.H), {})
            cells[row.what, row.provider] = row
    providers = list(dict.fromkeys(row.provider for row in found))
    heads = [*(f"{p} ms" for p in providers), "over torch", "target", "over jax", "forward only"]
    heads += ["GFLOP/s", "of GEMM", "kept by torch", "by rnnfast"]
    table = Table(title=title, caption=CAPTION, caption_justify="left")
    table.add_column("T, B, H", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    kind = ""
    for (new_kind, *shape), cells in by_point.items():
        if kind and new_kind != kind:
            table.add_section()
        kind = new_kind
        both = {p: cells.get((BOTH, p)) for p in providers}
        table.add_row(
            ", ".join(map(str, shape)),
            *(f"{1e3 * row.median_s:.3g}" if row else "" for row in both.values()),
            *_judged_cells(both.get("rnnfast"), cells.get((FORWARD, "rnnfast"))),
            *(_kilobytes(both.get(p)) for p in ("torch", "rnnfast")),
        )
    return table


CAPTION = """\
ms: median of forward+backward. over: their time / the time of rnnfast, median over the rounds.
forward only: the same over torch, under no_grad. of GEMM: GFLOP/s as a share of those of a product
of 2048 x 2048 x 2048 matrices. kept: kB for backward beyond input, parameters and outputs.
✕: below its target, which over jax is 1x."""


def _judged_cells(both: Row | None, forward: Row | None) -> list[str]:
    if both is None:
        return [""] * 6
    reached = {target.name.split(" ", 3)[-1]: target.reached for target in targets(both)}

    def cell(name: str, text: str) -> str:
        return text if reached.get(name, True) else f"[bold red]{text} ✕[/]"

    return [
        cell("over torch", _times(both.over_torch)),
        _times(both.target_over_torch),
        cell("over jax", _times(both.over_jax)),
        _times(forward and forward.over_torch),
        f"{both.gflops:.3g}",
        cell("share of GEMM", f"{both.gemm_share:.0%}"),
    ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _kilobytes(row: Row | None) -> str:
    return "" if row is None or row.saved_bytes is None else f"{row.saved_bytes / 1e3:,.0f}"


def write_csv(found: Sequence[Row], machine: dict[str, str], path: Path) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*Row.__dataclass_fields__, *machine])
        for row in found:
            values = (f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values())
            lines.writerow([*values, *machine.values()])
