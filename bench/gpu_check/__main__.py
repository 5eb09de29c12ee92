"""Builds rnnfast, tests, validates and times it on this machine's GPU, in under 9 minutes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import gpu
from .driver import Step, check, parse
from .stand_ins import STAND_INS

BUDGET_S = 520
# Prints the names of tests as they begin, and the stack of a test that hangs. Leaves no files.
PYTEST = (
    "python",
    "-m",
    "pytest",
    "-vv",
    "-o",
    "faulthandler_timeout=30",
    "-p",
    "no:cacheprovider",
)
# Seconds for each file of tests/gpu. Each is a process, so a crash ends one file only.
TEST_LIMITS = {"numbers": 50, "kernels": 45, "surroundings": 95, "tools": 40}
SMI = (
    "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
)


# Without CUDA kernels, every test and time below would use another backend.
BUILT = {"RNNFAST_REQUIRE_EXTENSION": "1", "RNNFAST_CUDA": "1"}
REQUIRED = {"RNNFAST_REQUIRE_GPU": "1"}  # tests/gpu fails if "cuda" cannot be used
RNNFAST = ("python", "-m", "rnnfast")


def beginning() -> tuple[Step, ...]:
    """Steps: the machine, the build for its GPU, and rnnfast.info()."""
    build = ("python", "setup.py", "--quiet", "build_ext", "--inplace")
    arch = {"RNNFAST_CUDA_ARCHS": gpu.architecture() or "native"}
    return (
        Step("gpu", ("nvidia-smi", SMI, "--format=csv,noheader"), 10, always=True),
        Step("build", build, 75, BUILT | arch, always=True),
        Step("info", (*RNNFAST, "info"), 20),
    )


def rest() -> tuple[Step, ...]:
    """Steps: tests, validation and times."""
    quick = ("--quick", "--device", "cuda", "--out", "{out}")
    return (
        *(
            Step(f"test_{name}", (*PYTEST, f"tests/gpu/test_gpu_{name}.py"), limit, REQUIRED)
            for name, limit in TEST_LIMITS.items()
        ),
        Step("validate", (*RNNFAST, "validate", *quick), 65),
        Step("plans", ("python", "-m", "bench.cuda_plans", "--out", "{out}"), 35),
        Step("overlap", ("python", "-m", "bench.cuda_overlap", "--out", "{out}"), 20),
        Step("bench", (*RNNFAST, "bench", *quick), 65),
    )


def steps() -> tuple[Step, ...]:
    return *beginning(), *rest()


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing failed; 1: something did (it is named); 2: unusable arguments, or no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    args = parse(parser, argv, BUDGET_S)
    return check("GPU check", STAND_INS if args.dry_run else steps(), args)


if __name__ == "__main__":
    sys.exit(main())
