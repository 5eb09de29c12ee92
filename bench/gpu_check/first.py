"""The first minutes on a GPU, under 7: builds rnnfast, judges every CUDA kernel, times two dozen
sizes beside cuDNN, probes the machine, then runs the steps of gpu-check that fit.

A second run continues in the folder of the last one and repeats no step that succeeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from .__main__ import PYTEST, REQUIRED, beginning, rest
from .driver import Step, check, parse

BUDGET_S = 400
# The tests of test_gpu_kernels.py that judge every kernel and dtype, plain and with all options.
JUDGED = "not clipped and not 760x3 and not 1270x9"
QUESTIONS = "1,2,3,5"  # questions of the probe: flight, ingress, resident clusters, tensor cores


def steps() -> tuple[Step, ...]:
    """The steps, the most valuable first."""
    probe = ("python", "-m", "bench.gpu_probe", "--only", QUESTIONS, "--budget", "60")
    return (
        *beginning(),
        Step("judge", (*PYTEST, "tests/gpu/test_gpu_kernels.py", "-k", JUDGED), 60, REQUIRED),
        Step("first", ("python", "-m", "bench.cuda_plans", "--first", "--out", "{out}"), 40),
        Step("probe", (*probe, "--out", "{out}"), 75),
        *rest(),
    )


def stand_ins() -> tuple[Step, ...]:
    """The same steps with processes that print a line. Tests order, folder, archive and summary."""
    missed = "MISS bfloat16 512 units, 16 rows, cluster16: a figure of no machine"
    said = {"first": [missed, "stand-in"]}

    def command(step: Step) -> tuple[str, ...]:
        return "python", "-c", f"print(*{said.get(step.name, ['stand-in'])!r}, sep='\\n')"

    return tuple(dataclasses.replace(step, command=command(step), env={}) for step in steps())


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing failed; 1: something did (it is named); 2: unusable arguments, or no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.first", description=__doc__)
    parser.add_argument("--again", action="store_true", help="also repeat steps that succeeded")
    args = parse(parser, argv, BUDGET_S)
    table = stand_ins() if args.dry_run else steps()
    return check("GPU first", table, args, resumes=not args.again)


if __name__ == "__main__":
    sys.exit(main())
