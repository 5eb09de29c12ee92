"""The stand-in for a GPU: it computes as PTX says, and it finds the faults that it is there for.

Programs of tests/cpp/emulated, whose threads are fibers in many orders; `make sanitize` runs them
with threads. That the kernels are right step by step is shown by tests/kernels/cuda/emulated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import setup as package

ROOT = Path(__file__).resolve().parents[2]

FLAGS = ["-DRNNFAST_EMULATION", "-U_FORTIFY_SOURCE", "-O1", "-Icsrc", "-std=c++20"]
PROBLEMS = "40"  # of a configuration, in which somebody has to notice a fault
CONFIGURATIONS = 14  # of kernel_test.cpp

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """The emulation, compiled."""
    file = tmp_path_factory.mktemp("emulation") / "machine.o"
    compiled("csrc/emulation/machine.cpp", "-c", "-o", str(file))
    return file


def compiled(*arguments: str) -> None:
    command = [*package.Compiler.find().command, *FLAGS, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def program(machine: Path, name: str, *flags: str) -> Path:
    """tests/cpp/emulated/<name>.cpp, compiled."""
    binary = machine.with_name("".join((name, *flags)))
    source = f"tests/cpp/emulated/{name}.cpp"
    compiled(*flags, source, str(machine), "-o", str(binary), "-pthread")
    return binary


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def kernels(machine) -> Path:
    return program(machine, "kernel_test")


def test_the_emulation_computes_as_ptx_says(machine):
    done = run(program(machine, "machine_test"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("RING_NO_START", "wait"),  # an mbarrier made after stores have counted in it
        ("RING_NO_WAIT", "more arrivals at an mbarrier than it was made for"),
        ("RING_PARITY", "more arrivals at an mbarrier than it was made for"),
        ("RING_EARLY_EXIT", "a store to a block that has ended"),
    ],
)
def test_fault_of_a_cluster_is_found(fault, words, machine):
    done = run(program(machine, "machine_test", "-DRING_FAULT", f"-D{fault}"))
    assert done.returncode == 1
    assert words in done.stdout


# ------------------------------------------------------------------------------ planted faults


class Fault(NamedTuple):
    """One call of a kernel that goes wrong, or a wrong argument of it."""

    kernel: str
    file: str
    line: str
    change: str

    def __str__(self) -> str:
        return f"{self.kernel}, {os.path.normpath(self.file)}:{self.line}: {self.change}"

    def source(self) -> str:
        """The line of the call and the three before it, with single blanks."""
        if not (ROOT / self.file).is_file():
            return ""
        lines = (ROOT / self.file).read_text().splitlines()
        return " ".join(" ".join(lines[max(int(self.line) - 4, 0) : int(self.line)]).split())


# Dropped synchronizations that no test notices: the kernel (None: any), how the lines of the call
# end, and the reason.
SCHEDULE = "the compiler alone needs it: loads that are under way at once take registers"
HARMLESS = [
    (None, "== 2 * K::kTiles - 1) rt::sync_block();", SCHEDULE),
    (None, "(Mode::kWeights > 4 || shared)) rt::sync_warp();", SCHEDULE),
    (None, "first % (kNumber == 2 ? 32 : 8) == 0) rt::sync_warp();", SCHEDULE),
    (
        "forward",
        "static void begin(const Place<K>&) { rt::sync_block();",
        "what a thread writes before the loop of a lone block only it reads; the barrier of the "
        "first state lies between",
    ),
    (
        None,
        "before the words of any lane are under way. rt::sync_warp();",
        "a lane that lags has still to send what it has read, and nobody writes there before that "
        "has come; the memory model of the device asks for it",
    ),
    (
        "backward",
        "rt::sync_warp(); // all lanes have read norm_phase, which lane 0 writes",
        "the lanes have met in shuffles since they read it; the memory model of the device asks "
        "for it",
    ),
]
# A vote that only keeps a warp's lanes together: nothing behind it needs all of them.
VOTES = ["rt::any(waits != 0)", "rt::any(ends != 0)", "rt::any((ends | empty) != 0)"]


def harmless(fault: Fault) -> bool:
    source = fault.source()
    if fault.change == "each lane by itself":
        return any(vote in source.rpartition("if (")[2] for vote in VOTES)
    if fault.change != "left out":
        return False
    return any(
        kernel in (None, fault.kernel) and source.endswith(end) for kernel, end, _ in HARMLESS
    )


@pytest.fixture(scope="module")
def places(kernels) -> dict[Fault, list[int]]:
    """Where faults can be planted, and the configurations that come there; all problems are right
    without one."""
    found: dict[Fault, list[int]] = {}
    for number in range(CONFIGURATIONS):
        done = run(kernels, PROBLEMS, str(number))
        assert done.returncode == 0, done.stdout
        for line in done.stdout.splitlines():
            found.setdefault(Fault(*line.split("\t")[1:]), []).append(number)
    return found


def test_every_synchronization_of_the_kernels_is_reached(places):
    """Every line of csrc/cuda that waits, votes or sends; rt.cuh is what they do it with."""
    calls = re.compile(r"\brt::(sync_\w+|mbarrier_\w+|any|send)\(")
    there = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "csrc/cuda").rglob("*.cu*")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "rt.cuh" and calls.search(line)
    }
    reached = {f"{os.path.normpath(place.file)}:{place.line}" for place in places}
    assert len(there) > 20
    assert there <= reached, sorted(there - reached)


def test_every_planted_fault_is_found(kernels, places):
    """By wrong numbers, by a report of the emulation or by a deadlock. What is harmless stays so:
    a fault of the list that somebody notices belongs no longer there."""

    def noticed(fault: Fault) -> bool:
        return any(run(kernels, PROBLEMS, str(n), *fault).returncode for n in places[fault])

    with ThreadPoolExecutor(os.cpu_count()) as each:
        found = dict(zip(places, each.map(noticed, places)))
    wrong = [str(fault) for fault, seen in found.items() if seen == harmless(fault)]
    assert not wrong, "\n".join(wrong)
    listed = [end for _, end, _ in HARMLESS] + VOTES
    sources = [fault.source() for fault, seen in found.items() if not seen]
    stale = [words for words in listed if not any(words in source for source in sources)]
    assert not stale, stale
