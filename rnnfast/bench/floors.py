"""The least time that a machine can need, from measurements of the machine.

    floor = max(FLOP / rate of large matrix products, bytes / rate of a copy, T * one exchange)

The same run measures the rate of products. ``make gpu-probe`` on that GPU measures the other two:
the rate of a copy, and the time of an exchange between two blocks. If the weights do not fit into
one block (H above 256 in 2-byte types, above 128 in 4-byte types), every step waits for one
exchange. Without the figures of gpu-probe the floor is its first part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .workload import FORWARD, Workload

ONE_BLOCK = {2: 256, 4: 128, 8: 64}  # {bytes of an element: largest H of one block}


@dataclass(frozen=True)
class Chip:
    """The figures of `make gpu-probe` for the GPU ``name``."""

    name: str
    copy: float  # bytes/s, read and written
    hop: float  # s, the shortest way from block to block


class ProbeError(ValueError):
    """The file holds no figures of make gpu-probe."""


def read_probe(path: Path) -> Chip:
    """
    Raises:
        ProbeError: the file cannot be read, or lacks the figures.
    """
    try:
        found = json.loads(path.read_text())
        figures = found["figures"]
        name = found["machine"].get("gpu", "")
        copy = max(f["value"] for f in figures if f["figure"] == "copy") * 1e12
        clock = max(f["value"] for f in figures if f["figure"] == "sm_clock") * 1e6
        hops = [f["value"] for f in figures if f["figure"] in ("st_async_hop", "l2_hop")]
        return Chip(name, copy, min(hops) / clock)
    except OSError as error:
        raise ProbeError(f"--probe: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProbeError(f"--probe: {path} is no result of make gpu-probe ({error})") from None


def latest_probe(folder: Path, gpu: str) -> Chip | None:
    """The newest figures of this GPU in the results of a checkout."""
    found = [read_probe(path) for path in sorted(folder.glob("gpu_probe_*.json"))]
    return next((chip for chip in reversed(found) if chip.name == gpu), None)


def floor(work: Workload, what: str, gemm_flops: float, chip: Chip | None) -> float:
    """The least seconds that the work can take.

    Args:
        gemm_flops: FLOP/s of a large product in the workload's precision.
    """
    times = [work.flops(what) / gemm_flops]
    if chip is not None:
        times.append(work.bytes(what) / chip.copy)
        if ONE_BLOCK[work.dtype.itemsize] < work.H:
            passes = 1 if what == FORWARD else 2
            times.append(passes * (work.T + work.layers - 1) * chip.hop)  # layers may overlap
    return max(times)
