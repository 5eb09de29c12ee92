"""Turns samples into the lines of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch

from . import points
from .floors import Chip, floor
from .providers import OURS
from .providers.layer import Layer
from .timing import quantiles, speed_up
from .workload import BOTH, FORWARD, Workload


@dataclass(frozen=True)
class Row:
    """Times of one provider. bench/README.md describes the columns. In a file, the facts of the
    machine follow them."""

    kind: str
    T: int
    B: int
    H: int
    precision: str
    layers: int
    directions: int
    norm: str
    packed: bool
    device: str
    what: str
    provider: str
    how: str
    threads: int
    median_s: float
    p10_s: float
    p90_s: float
    rounds: int
    us_per_step: float
    gflops: float
    gemm_gflops: float | None
    bytes: int
    floor_s: float | None
    floor_share: float | None
    over_torch: float | None
    over_torch_p10: float | None
    over_torch_p90: float | None
    over_jax: float | None
    target_over_torch: float | None
    saved_bytes: int | None
    # The defaults read older files, which lack these.
    estimated_us_per_step: float | None = None
    cell: str = "rnn_tanh"

    @property
    def work(self) -> Workload:
        return Workload(**{f.name: getattr(self, f.name) for f in fields(Workload)})

    @property
    def ours(self) -> bool:
        return self.provider in {provider.name for provider in OURS}


def rows(
    work: Workload,
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    layers: Mapping[str, Layer],
    gemm_gflops: float | None,
    chip: Chip | None,
    threads: int | None = None,
) -> list[Row]:
    """
    Args:
        samples: {what: {provider: seconds of each round}}.
        gemm_gflops: rate of a large product, just before and after.
    """
    found = []
    native = layers["torch"].how if "torch" in layers else ""
    saved = {name: layer.saved_bytes() for name, layer in layers.items()}
    for what, by_provider in samples.items():
        least = None if gemm_gflops is None else floor(work, what, gemm_gflops * 1e9, chip)
        for provider, layer in layers.items():
            if provider not in by_provider:
                continue
            seconds = by_provider[provider]
            time = quantiles(seconds)
            over = {
                p: speed_up(by_provider[p], seconds) for p in ("torch", "jax") if p in by_provider
            }
            of_torch = over.get("torch", (None, None, None))
            judged = provider in {p.name for p in OURS} and what == BOTH and "torch" in over
            found.append(
                Row(
                    **asdict(work),
                    what=what,
                    provider=provider,
                    how=layer.how,
                    threads=threads or torch.get_num_threads(),
                    median_s=time.median,
                    p10_s=time.p10,
                    p90_s=time.p90,
                    rounds=len(seconds),
                    us_per_step=1e6 * time.median / work.T,
                    gflops=work.flops(what) / time.median / 1e9,
                    gemm_gflops=gemm_gflops,
                    bytes=work.bytes(what),
                    floor_s=least,
                    floor_share=least and least / time.median,
                    over_torch=of_torch[0],
                    over_torch_p10=of_torch[1],
                    over_torch_p90=of_torch[2],
                    over_jax=over["jax"].median if "jax" in over else None,
                    target_over_torch=points.target(work, native) if judged else None,
                    saved_bytes=saved[provider],
                    estimated_us_per_step=layer.estimated_us_per_step if what == FORWARD else None,
                )
            )
    return found


def write_csv(found: Sequence[Row], machine: Mapping[str, str], path: Path) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*Row.__dataclass_fields__, *machine])
        for row in found:
            values = (f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values())
            lines.writerow([*values, *machine.values()])


class FormatError(ValueError):
    """The file is not one that write_csv wrote."""


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows and the machine. Columns that have a default in Row may be missing.

    Raises:
        FormatError: the file cannot be read, or has other columns.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"cannot read {path}: {error}") from None
    there = list(lines[0]) if lines else []
    names = [f.name for f in fields(Row) if f.default is MISSING or f.name in there]
    if not lines or there[: len(names)] != names:
        raise FormatError(f"{path}: given other columns than `rnnfast bench` writes, or no line")
    machine = {name: value for name, value in lines[0].items() if name not in names}
    return [Row(**{n: _read(n, line[n]) for n in names}) for line in lines], machine


def _read(name: str, text: str) -> object:
    kind = Row.__dataclass_fields__[name].type  # a string: annotations are not evaluated
    if text == "" and "None" in kind:
        return None
    return {"str": str, "bool": lambda t: t == "True", "int": int, "float": float}[kind.split()[0]](
        text
    )
