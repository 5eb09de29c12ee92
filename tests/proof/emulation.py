"""Builds the CUDA kernels for the host, as a module that the cuda backend loads
where RNNFAST_EMULATION names its file (printed at the end). For tests alone."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import setup as package  # noqa: E402

FOLDER = "build/emulation"
MODULE = f"{FOLDER}/_emulated{importlib.machinery.EXTENSION_SUFFIXES[0]}"
# Frames are jumped out of, which the hardened longjmp takes for an attack.
FLAGS = ["-DRNNFAST_EMULATION", "-U_FORTIFY_SOURCE", "-O2"]


def steps(compiler: package.Compiler, folder: str, flags: list[str]) -> list[package.Step]:
    """The kernels and the machine that they run on."""
    found = []
    for name, source, mode, family in package.cuda_objects():
        of_kernel = [*flags, *package.kernel_flags(mode, family)]
        found.append(package.compile_step(compiler, source, f"{folder}/{name}.o", of_kernel))
    sources = "record/measure.cu", "host/plan.cpp", "host/launch.cpp"
    for source in (*(f"csrc/cuda/{name}" for name in sources), "csrc/emulation/machine.cpp"):
        output = f"{folder}/{Path(source).stem}.o"
        found.append(package.compile_step(compiler, source, output, flags))
    return found


def main() -> None:
    os.chdir(ROOT)
    compiler = package.Compiler.find()
    all_steps = steps(compiler, FOLDER, FLAGS)
    bindings = package.compile_step(
        compiler,
        "csrc/emulation/bindings.cpp",
        f"{FOLDER}/bindings.o",
        [*FLAGS, *package.python_includes()],
    )
    all_steps.append(bindings)
    objects = [step.output for step in all_steps]
    link = [*compiler.command, *objects, *package.link_flags(compiler), "-o", MODULE]
    package.make([*all_steps, package.Step("link", objects, MODULE, link)], FOLDER)
    print(ROOT / MODULE)


if __name__ == "__main__":
    main()
