"""Runs small workloads under Nsight Compute and compute-sanitizer, if the machine has them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from .driver import Step, check, parse
from .stand_ins import STAND_INS
from .workload import OTHERS, workloads

BUDGET_S = 520
SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")
LAUNCHES = 20  # kernels of a workload that ncu profiles
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
NO_COUNTERS = (
    "ERR_NVGPUCTRPERM",
    "ERR_NVGPUCTRPERM: this user may not read the GPU's performance counters",
)


def steps(names: Sequence[str], kernels: str = "") -> tuple[Step, ...]:
    """Five steps for each workload, which share the time, over kernels named with ``kernels``."""
    limit_s = min(60, BUDGET_S // (len(names) * (1 + len(SANITIZERS))))
    found = []
    for name in names:
        workload = ("python", "-m", "bench.gpu_check.workload", name)
        ncu = ["ncu", "--profile-from-start", "off", "--launch-count", str(LAUNCHES)]
        ncu += ["--clock-control", "none"]  # leaves the card's settings alone
        ncu += [word for section in SECTIONS for word in ("--section", section)]
        ncu += ["--page", "details", "--force-overwrite", "--export", f"{{out}}/{name}"]
        ncu += ["--kernel-name", f"regex:{kernels}"] if kernels else []
        found.append(Step(f"{name}-ncu", (*ncu, *workload), limit_s, excuse=NO_COUNTERS))
        for tool in SANITIZERS:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            command += ["--print-limit", "20"]
            command += ["--kernel-name", f"kernel_substring={kernels}"] if kernels else []
            # One allocation for each tensor, so that memcheck sees where the tensor ends.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(f"{name}-{tool}", (*command, *workload), limit_s, env))
    return tuple(found)


def _part(text: str) -> str:
    if not re.fullmatch(r"\w*", text):
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted letters, digits and '_'")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """0: no findings; 1: findings, or a step failed; 2: unusable arguments, or no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.profile", description=__doc__)
    known = workloads()
    ours = [name for name in known if name not in OTHERS] or list(known)
    text = f"some of {', '.join(known)} (default {','.join(ours)})"
    parser.add_argument("--workloads", default=",".join(ours), metavar="NAME,NAME", help=text)
    parser.add_argument(
        "--kernels",
        type=_part,
        default="",
        metavar="TEXT",
        help="only kernels with it in their name",
    )
    args = parse(parser, argv, BUDGET_S)
    names = args.workloads.split(",")
    if not set(names) <= set(known):
        wanted = ", ".join(known)
        parser.error(f"argument --workloads: given {args.workloads!r}, wanted some of {wanted}")
    return check("GPU profile", STAND_INS if args.dry_run else steps(names, args.kernels), args)


if __name__ == "__main__":
    sys.exit(main())
