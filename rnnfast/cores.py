"""How many cores this process may use, and how loaded the machine is."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

LOADED = 0.25  # processes per CPU


class Load(NamedTuple):
    """The load average: processes that ran or waited for a CPU, over the last minute."""

    average: float
    cpus: int

    @property
    def loaded(self) -> bool:
        return self.average >= LOADED * self.cpus

    def __str__(self) -> str:
        plural = "s" if self.cpus > 1 else ""
        return f"load average {self.average:.2f} on {self.cpus} CPU{plural}"


def load() -> Load | None:
    """The load of this machine; None where the system does not say."""
    try:
        return Load(os.getloadavg()[0], os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def quota(root: Path = Path("/")) -> int:
    """The CPU quota that a container's cgroups set, in whole cores rounded up; 0 without a quota.

    Every cgroup above the process may set a limit, and the smallest holds, in both versions of
    cgroups. Only Linux has them.
    """
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        home = root / "sys/fs/cgroup" / controllers
        for folder in (path, *map(str, PurePosixPath(path).parents)):
            limits.append(_limit(home / folder.lstrip("/")))
    return math.ceil(min((limit for limit in limits if limit), default=0))


def _limit(folder: Path) -> float:
    """The cores that one cgroup grants; 0 without a limit."""
    # Version 1 has quota and period in two files, version 2 in one.
    version_1 = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
    numbers = re.match(r"\s*(\d+)\s+(\d+)", _text(folder / "cpu.max") or version_1)
    return int(numbers[1]) / int(numbers[2]) if numbers else 0  # "max" and -1 are no numbers


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
