"""How much memory a machine still has."""

from __future__ import annotations

import os
from pathlib import Path

import torch

GROUP = Path("/sys/fs/cgroup")  # of a container


def free_memory(device: str) -> int:
    """Free bytes of the device."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of all memory may be in use
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return min(1024 * int(line.split()[1]), _left_to_the_group())


def _left_to_the_group() -> float:
    try:
        most, used = ((GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return int(most) - int(used)
    except (OSError, ValueError):  # no file, or "max": there is no limit
        return float("inf")
