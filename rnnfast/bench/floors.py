"""The least time that a machine can need, from what was measured of it.

    floor = max(FLOP / rate of large matrix products, bytes / rate of a copy, T * one exchange)

The rate of products is measured in the same run. The other two are of ``make gpu-probe`` on that
GPU: the copy, and the time in which one block tells another of a step's result, which every step
has to wait for once the weights do not fit into one block (gpu_kernels.md's designs, H above 256 in
2-byte types and 128 in 4-byte ones). Without its figures the first part stands alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .workload import FORWARD, Workload

ONE_BLOCK = {2: 256, 4: 128, 8: 64}  # bytes an element: the largest H of one block


@dataclass(frozen=True)
class Chip:
    """What `make gpu-probe` has measured; ``name`` of the GPU."""

    name: str
    copy: float  # bytes/s, read and written
    hop: float  # s, the shortest way from block to block


class ProbeError(ValueError):
    """The file holds no figures of make gpu-probe."""


def read_probe(path: Path) -> Chip:
    """
    Raises:
        ProbeError: it cannot be read, or lacks the figures.
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
    """Of this GPU, from the results of a checkout."""
    found = [read_probe(path) for path in sorted(folder.glob("gpu_probe_*.json"))]
    return next((chip for chip in reversed(found) if chip.name == gpu), None)


def floor(work: Workload, what: str, gemm_flops: float, chip: Chip | None) -> float:
    """Seconds.

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
