"""Instructions that the CPU kernels take for fixed problems, counted by callgrind: unlike a time,
the same on a busy machine. After a change that is meant to move them:

    .venv/bin/python tests/proof/counts/record_counts.py

writes recorded.json, which test_instruction_counts.py compares with. float32, one thread, the AVX2
level whatever the machine has, setup.py's own flags.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
import setup as package  # noqa: E402

RECORDED = Path(__file__).with_name("recorded.json")
COMMAND = ".venv/bin/python tests/proof/counts/record_counts.py"
FOLDER = "build/counts"  # under ROOT
LEVEL = "avx2"
NEEDED = {"avx2", "fma", "f16c"}  # of the processor
SIZES = {"T32_B1_H64": (32, 1, 64), "T16_B16_H128": (16, 16, 128), "T4_B32_H256": (4, 32, 256)}
# Cells, and the options whose cost is limited. The kernels of gated cells have a norm, too, which
# no module asks for yet.
CELLS = {
    "rnn_tanh": ("norm", "clip", "record"),
    "lstm": ("clip", "record"),
    "gru": ("clip", "record"),
}
WITH_OPTIONS = ("T16_B16_H128", "T4_B32_H256")


def name_of(cell: str, size: str, option: str = "") -> str:
    return "_".join(filter(None, (cell.removeprefix("rnn_tanh"), size, option)))


CASES: dict[str, tuple] = {name_of(c, s): (c, *SIZES[s]) for c in CELLS for s in SIZES}
CASES |= {
    name_of(cell, size, option): (cell, *SIZES[size], option)
    for cell, options in CELLS.items()
    for size in WITH_OPTIONS
    for option in options
}
DIRECTIONS = ("forward", "backward")


def unavailable() -> str | None:
    """Why no instructions can be counted here."""
    if shutil.which("valgrind") is None:
        return "valgrind is not on the PATH"
    try:
        compiler = package.Compiler.find()
    except package.Unavailable as error:
        return str(error)
    if LEVEL not in compiler.simd():
        return f"the counts are of x86-64, the compiler's target is {compiler.target}"
    missing = NEEDED - processor_flags()
    if missing:
        return f"the processor lacks {', '.join(sorted(missing))}"
    for variable in ("CPPFLAGS", "CXXFLAGS"):
        if package.user_flags(variable):
            return f"{variable} is set, and the counts are of setup.py's own flags"
    return None


def incomparable() -> str | None:
    """Why counts made here differ from the recorded ones although no kernel has changed."""
    recorded = json.loads(RECORDED.read_text())["compiler"]
    here = package.Compiler.find().version
    if family_and_major(here) == family_and_major(recorded):
        return None
    return f"the counts are recorded with '{recorded}', the compiler here is '{here}'"


def family_and_major(version: str) -> tuple[str, str]:
    """From the first line of --version: ("gcc", "12"), ("clang", "17")."""
    family = "clang" if "clang" in version else "gcc"
    number = re.search(r"(?:\) |version )(\d+)\.", version)
    return family, number[1] if number else version


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()[2:]}


def build() -> Path:
    compiler = package.Compiler.find()
    program = f"{FOLDER}/kernels"
    flags = package.level_flags(compiler, LEVEL)
    threads = package.compile_step(compiler, "csrc/cpu/parallel.cpp", f"{FOLDER}/parallel.o", [])
    steps = [threads]
    for source in ("tests/proof/counts/kernels.cpp", *package.SIMD_SOURCES):
        output = f"{FOLDER}/{Path(source).stem}.o"
        steps.append(package.compile_step(compiler, source, output, flags))
    objects = [step.output for step in steps]
    # Symbols are bound at the start: the loader's search for them is not counted.
    link = [*compiler.command, *objects, "-Wl,-z,now", "-pthread", "-ldl", "-o", program]
    home = Path.cwd()
    os.chdir(ROOT)  # setup.py's paths are relative
    try:
        package.make([*steps, package.Step("link", objects, program, link)], FOLDER)
    finally:
        os.chdir(home)
    return ROOT / program


def count(program: Path, case: str, direction: str) -> int:
    """Instructions inside the kernel call; what sets the problem up is left out."""
    out = program.with_name(f"{case}.{direction}.callgrind")
    valgrind = [
        str(shutil.which("valgrind")),
        "--tool=callgrind",
        f"--toggle-collect=run_{direction}",
        f"--callgrind-out-file={out}",
    ]
    done = subprocess.run(
        [*valgrind, str(program), *map(str, CASES[case])],
        env={},  # it lies on the stack, and moves what comes after it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{case} ended with {done.returncode}:\n{done.stdout}")
    total = re.search(r"^totals: (\d+)$", out.read_text(), re.MULTILINE)
    if total is None or int(total[1]) == 0:
        raise RuntimeError(f"callgrind has seen no run_{direction} in {program}")
    return int(total[1])


def main() -> int:
    reason = unavailable()
    if reason is not None:
        print(f"nothing was recorded: {reason}", file=sys.stderr)
        return 1
    program = build()
    counts = {case: {d: count(program, case, d) for d in DIRECTIONS} for case in CASES}
    recorded = {"compiler": package.Compiler.find().version, "counts": counts}
    RECORDED.write_text(json.dumps(recorded, indent=2) + "\n")
    print(RECORDED.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
