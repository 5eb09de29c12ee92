"""`make sanitize`: builds each program of tests/cpp for the best SIMD levels of this machine, two
unless --levels says otherwise, and those of its emulated, once with each set of sanitizers, and
runs it. Compiler, levels and flags are those of setup.py.

Which thread reads and writes what is the same at every level: one is enough for that sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import setup as package  # noqa: E402

FOLDER = "build/sanitize"
# With detect_stack_use_after_return GCC places variables on boundaries of 32 bytes, and stores 64
# bytes as if they lay on boundaries of 64 (GCC PR 110027).
NARROW_MOVES = ["-mmove-max=256", "-mstore-max=256"]
LIMIT = 300  # seconds for one program
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def steps(compiler: package.Compiler, sanitizer: str, levels: list[str]) -> list[package.Step]:
    """Build steps of the programs: each is one source, which includes the kernels, and threads."""
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS[sanitizer]]
    if sanitizer == "address" and knows(compiler, NARROW_MOVES):
        flags += NARROW_MOVES
    folder = f"{FOLDER}/{sanitizer}"
    threads = package.compile_step(compiler, "csrc/cpu/parallel.cpp", f"{folder}/parallel.o", flags)
    found = [threads]
    for source in sorted(Path("tests/cpp").glob("*.cpp"), reverse=True):
        for level in levels:
            program = f"{folder}/{source.stem}.{level}"
            options = [*flags, *package.level_flags(compiler, level)]
            main = package.compile_step(compiler, source.as_posix(), f"{program}.o", options)
            objects = [main.output, threads.output]
            link = [*compiler.command, *flags, *objects, "-pthread", "-ldl", "-o", program]
            found += [main, package.Step("link", objects, program, link)]
    return found


def knows(compiler: package.Compiler, flags: list[str]) -> bool:
    """Whether the compiler takes these flags: Clang, older GCC and other processors do not."""
    command = [*compiler.command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def emulated_steps(compiler: package.Compiler, sanitizer: str) -> list[package.Step]:
    """Build steps of the programs that run GPU kernels on threads of the host."""
    flags = ["-O0", "-g1", "-DRNNFAST_EMULATION", "-DRNNFAST_EMULATION_THREADS"]
    flags += SANITIZERS[sanitizer]
    folder = f"{FOLDER}/{sanitizer}/emulated"
    machine = package.compile_step(
        compiler, "csrc/emulation/machine.cpp", f"{folder}/machine.o", flags
    )
    found = [machine]
    for source in sorted(Path("tests/cpp/emulated").glob("*.cpp")):
        program = f"{folder}/{source.stem}"
        main = package.compile_step(compiler, source.as_posix(), f"{program}.o", flags)
        objects = [main.output, machine.output]
        link = [*compiler.command, *flags, *objects, "-pthread", "-o", program]
        found += [main, package.Step("link", objects, program, link)]
    return found


def build(levels: list[str], number: int) -> list[str]:
    """All programs at once, those that run longest first."""
    compiler = package.Compiler.find()
    found = [s for sanitizer in reversed(SANITIZERS) for s in emulated_steps(compiler, sanitizer)]
    found += steps(compiler, "thread", levels[-1:])
    found += steps(compiler, "address", levels[-number:])
    package.make(found, FOLDER)
    return [step.output for step in found if step.rule == "link"]


def levels_of_this_machine() -> list[str]:
    (file,) = Path("rnnfast").glob(f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    spec = importlib.util.spec_from_file_location("_C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.simd_levels()


def passes(program: str) -> bool:
    # ThreadSanitizer of GCC 12 does not know how far newer kernels randomize addresses.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    start = time.monotonic()
    try:
        done = subprocess.run([*fixed, program], env=os.environ | ENVIRONMENT, timeout=LIMIT)
        outcome = "ok" if done.returncode == 0 else f"FAILED with {done.returncode}"
    except subprocess.TimeoutExpired:
        outcome = f"FAILED: still running after {LIMIT} s"
    print(f"{program}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
    return outcome == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, default=2, help="under the address sanitizer")
    number = parser.parse_args().levels
    if number < 1:
        parser.error(f"--levels: given {number}, wanted 1 or more")
    os.chdir(ROOT)
    levels = levels_of_this_machine()
    print(f"SIMD levels of this machine: {', '.join(levels)}", flush=True)
    try:
        programs = build(levels, number)
    except package.Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    # Processes; threads only wait for them.
    with ThreadPoolExecutor(os.cpu_count()) as each:
        results = list(each.map(passes, programs))
    if not results:
        print("no program in tests/cpp: nothing was checked", file=sys.stderr)
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
