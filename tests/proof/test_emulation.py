"""The stand-in for a GPU: it computes as PTX says, and it finds the faults that it is there for.

Programs of tests/cpp/emulated, whose threads are fibers in many orders; `make sanitize` runs them
with threads. That the kernels are right step by step is shown by tests/kernels/cuda/emulated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import setup as package

ROOT = Path(__file__).resolve().parents[2]

FLAGS = ["-DRNNFAST_EMULATION", "-U_FORTIFY_SOURCE", "-O0", "-Icsrc", "-std=c++20"]

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy in which faults can be planted, with the emulation compiled."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests/cpp", folder / "tests/cpp")
    compiled(folder, "csrc/emulation/machine.cpp", "-c", "-o", "machine.o")
    return folder


def compiled(folder: Path, *arguments: str) -> None:
    command = [*package.Compiler.find().command, *FLAGS, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def program(folder: Path, name: str, *flags: str, number: int = 40) -> subprocess.CompletedProcess:
    """What tests/cpp/emulated/<name>.cpp says of so many problems a kernel."""
    binary = folder / f"{name}.{abs(hash(flags))}"
    source = f"tests/cpp/emulated/{name}.cpp"
    compiled(folder, *flags, source, "machine.o", "-o", str(binary), "-pthread")
    return subprocess.run([binary, str(number)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["machine_test", "kernel_test"])
def test_programs_find_nothing_wrong(name, sources):
    done = program(sources, name, number=8)
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
def test_fault_of_a_cluster_is_found(fault, words, sources):
    done = program(sources, "machine_test", "-DRING_FAULT", f"-D{fault}")
    assert done.returncode == 1
    assert words in done.stdout


FAULTS_OF_BLOCK = {  # file of csrc/cuda, what stands there, what takes its place
    "no barrier before the state is read": (
        "exchange.cuh",
        (
            "    rt::sync_block();\n  } else {\n    rt::mbarrier_wait(barrier_of<K>(i % 2)",
            "  } else {\n    rt::mbarrier_wait(barrier_of<K>(i % 2)",
        ),
    ),
    "no barrier between the sums": (
        "norms.cuh",
        ("  if constexpr (K::kBlocks == 1) rt::sync_block();\n", ""),
    ),
    "one half of the state, read late": (
        "exchange.cuh",
        ("(K::kState) + i % 2 * K::kStateWords", "(K::kState) + i * 0"),
    ),
    "one column too many": (
        "place.cuh",
        (
            "W::column(place.lane, j) < place.rows && (col",
            "W::column(place.lane, j) <= place.rows && (col",
        ),
    ),
    "one unit too many": ("place.cuh", ("return size - word_unit", "return 1 + size - word_unit")),
    "one step too few": (
        "forward.cuh",
        ("for (int i = 0; i < steps; ++i", "for (int i = 1; i < steps; ++i"),
    ),
    "p of the step before": ("forward.cuh", ("      p.go(d);\n", "")),
    "a reset one step late": ("forward.cuh", ("bits = look_up(t);", "bits = look_up(t - toward);")),
    "dp of the step before is scaled by the step's own": (
        "backward.cuh",
        ("      if (i > 0) put_dp();  // of the step before\n", ""),
        (
            "          again = rt::any(large[0] || large[1]);\n",
            "          again = rt::any(large[0] || large[1]);\n          if (i > 0) put_dp();\n",
        ),
    ),
    "layer norm's sums are not taken anew": (
        "backward.cuh",
        ("if (!kTogether || rt::any(at_once[0] || at_once[1])) {", "if (!kTogether) {"),
    ),
    "what was looked up of the step before": (
        "backward.cuh",
        ("next = look_up(time_of(i + 1));", "next = look_up(time_of(i));"),
    ),
}
FAULTS_OF_CLUSTER = {
    "no wait for the state": (
        "exchange.cuh",
        ("rt::mbarrier_wait(barrier_of<K>(i % 2), i / 2 % 2);", ""),
    ),
    "wrong parity": (
        "exchange.cuh",
        ("(barrier_of<K>(i % 2), i / 2 % 2)", "(barrier_of<K>(i % 2), i % 2)"),
    ),
    "no wait for the sums": (
        "exchange.cuh",
        ("rt::mbarrier_wait(barrier_of<K>(which), phase % 2);", ""),
    ),
    "what clips has one half": (
        "exchange.cuh",
        ("(which == kOfClipSecond ? kSumsBytes<K::kEntries, 2> / 4 : 0)", "0"),
    ),
    "rows that are too large are not sent once more": (
        "backward.cuh",
        ("again = rt::any(large[0] || large[1]);", "again = false;"),
    ),
    "warps that own nothing are not told of it": (
        "backward.cuh",
        ("!place.owner()) again = *told(turn);", "!place.owner()) again = false;"),
    ),
    "clipped twice": (
        "backward.cuh",
        ("scale[e] = large[e] ? 1.0f : scale[e];", "scale[e] = scale[e];"),
    ),
    "told what to expect before the phase ends": (
        "forward.cuh",
        ("    expect_state<K>(i, place);\n", ""),
        ("    await_state<K>(i);", "    expect_state<K>(i, place);\n    await_state<K>(i);"),
    ),
    "one half of the state, read late": (
        "exchange.cuh",
        ("(K::kState) + i % 2 * K::kStateWords", "(K::kState) + i * 0"),
    ),
    "columns are sent that nobody expects": (
        "exchange.cuh",
        ("} else if (Mode::column(place.lane) < place.rows) {", "} else {"),
    ),
    "a block ends early": (
        "forward.cuh",
        (
            "    await_state<K>(i);",
            "    if (place.block_unit > 0 && i + 1 == steps) return;\n    await_state<K>(i);",
        ),
    ),
    "no barrier of the band": ("kernel.cuh", ("rt::sync_threads(1 + band, K::kParts * 32);", "")),
    "stores before all mbarriers are made": ("exchange.cuh", ("    rt::sync_cluster();\n", "")),
    "the state of the last step is sent": (
        "forward.cuh",
        ("if (K::kBlocks == 1 || i + 1 < steps) put_seen", "put_seen"),
    ),
}
FAULTS_OF_STREAMING = {
    "no barrier before the parts are added": (
        "streaming.cuh",
        (
            "    rt::sync_block();\n    RT_UNROLL for (int v = 0; v < 4; ++v) mine",
            "    RT_UNROLL for (int v = 0; v < 4; ++v) mine",
        ),
    ),
    "no barrier between a block's sums": (
        "streaming.cuh",
        (
            "  rt::sync_block();\n  RT_UNROLL for (int n = 0; n < kNumber; ++n) {",
            "  RT_UNROLL for (int n = 0; n < kNumber; ++n) {",
        ),
    ),
    "one half of the state": ("streaming.cuh", ("std::int64_t{i % 2} * groups", "i * 0 * groups")),
    "the last step of a product left out": (
        "streaming.cuh",
        ("end = steps * (warp + 1) / kWarps;", "end = (steps - 1) * (warp + 1) / kWarps;"),
    ),
    "another slice's place": (
        "streaming_forward.cuh",
        (
            "const Place<K> place(a.shape, tile, strip.slice);\n    const int t = forward",
            "const Place<K> place(a.shape, tile, 0);\n    const int t = forward",
        ),
    ),
    "a slice past the last": (
        "streaming.cuh",
        ("return tile < w.tiles && slice < w.slices;", "return tile < w.tiles;"),
    ),
    "a row that has not begun forgets h_0": (
        "streaming_forward.cuh",
        ("if (rt::any(waits != 0)) {", "if (rt::any(waits != 0) && i < 0) {"),
    ),
    "dh_0 of the last launch alone": (
        "streaming_backward.cuh",
        ("row.begun = i > 0 &&", "row.begun = i == a.shape.steps &&"),
    ),
    "dgamma of the last step alone": (
        "streaming_backward.cuh",
        ("gain[k] + (step.i > 0 ? a.dgamma[unit] : 0.0f);", "gain[k];"),
    ),
    "a mean that is not clipped": (
        "streaming_backward.cuh",
        (
            "mean[e] = (large ? sums[4][e] : sums[2][e]) * each;",
            "mean[e] = (large ? sums[4][e] : sums[2][e]) * a.shape.each;",
        ),
    ),
    "a launch too few": (
        "streaming.cu",
        (
            "for (; step.i < problem.shape.steps; ++step.i)",
            "for (step.i = 1; step.i < problem.shape.steps; ++step.i)",
        ),
    ),
}
ALL_FAULTS = {
    "FAULT_OF_BLOCK": FAULTS_OF_BLOCK,
    "FAULT_OF_CLUSTER": FAULTS_OF_CLUSTER,
    "FAULT_OF_STREAMING": FAULTS_OF_STREAMING,
}
FAULTS = [(kind, fault) for kind, faults in ALL_FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_planted_fault_is_found(kind, fault, sources, tmp_path):
    file, *changes = ALL_FAULTS[kind][fault]
    for name in ("csrc", "tests"):
        shutil.copytree(sources / name, tmp_path / name)
    shutil.copy(sources / "machine.o", tmp_path)
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    assert program(tmp_path, "kernel_test", "-DFAULT", f"-D{kind}").returncode != 0
