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
        "resident/exchange_block.cuh",
        ("static void await_state(int) { rt::sync_block(); }", "static void await_state(int) {}"),
    ),
    "no barrier between the sums": (
        "resident/exchange_block.cuh",
        (
            "static void await_sums(int, int) {\n    rt::sync_block();\n",
            "static void await_sums(int, int) {\n",
        ),
    ),
    "one half of the state, read late": (
        "resident/exchange.cuh",
        ("(K::kState) + turn % 2 * K::kStateWords", "(K::kState) + turn * 0"),
    ),
    "one column too many": (
        "device/place.cuh",
        (
            "W::column(place.lane, j) < place.rows && (col",
            "W::column(place.lane, j) <= place.rows && (col",
        ),
    ),
    "one unit too many": (
        "device/place.cuh",
        ("return size - word_unit", "return 1 + size - word_unit"),
    ),
    "one step too few": (
        "resident/forward.cuh",
        ("for (int i = 0; i < steps; ++i", "for (int i = 1; i < steps; ++i"),
    ),
    "p of the step before": ("resident/forward.cuh", ("      p.go(d);\n", "")),
    "a reset one step late": (
        "resident/forward.cuh",
        ("bits = look_up(t);", "bits = look_up(t - toward);"),
    ),
    "dp of the step before is scaled by the step's own": (
        "resident/backward_step.cuh",
        ("      if (i > 0) put_clipped_dp();", "      //"),
        (
            "return clip_.await(i, place_, rows_, a_.clip);",
            "const bool again = clip_.await(i, place_, rows_, a_.clip);\n"
            "    if (i > 0) put_clipped_dp();\n    return again;",
        ),
    ),
    "layer norm's sums are not taken again": (
        "resident/norm_backward.cuh",
        (
            "if (!kFuseNormSums || rt::any(clip_first[0] || clip_first[1])) {",
            "if (!kFuseNormSums) {",
        ),
    ),
    "what was looked up of the step before": (
        "resident/backward_step.cuh",
        ("next_ = look_up(time_of(i));", "next_ = look_up(time_of(i > 0 ? i - 1 : 0));"),
    ),
}
FAULTS_OF_CLUSTER = {
    "no wait for the state": (
        "resident/exchange_cluster.cuh",
        ("rt::mbarrier_wait(barrier_of(turn % 2), turn / 2 % 2);", ""),
    ),
    "wrong parity": (
        "resident/exchange_cluster.cuh",
        ("(barrier_of(turn % 2), turn / 2 % 2)", "(barrier_of(turn % 2), turn % 2)"),
    ),
    "no wait for the sums": (
        "resident/exchange_cluster.cuh",
        ("rt::mbarrier_wait(barrier_of(which), phase % 2);", ""),
    ),
    "what clips has one half": (
        "resident/exchange.cuh",
        ("(which == kOfClipSecond ? kSumsBytes<K::kEntries, 2> / 4 : 0)", "0"),
    ),
    "rows that are too large are not sent once more": (
        "resident/clipping.cuh",
        ("return rt::any(large_[0] || large_[1]);", "return false;"),
    ),
    "warps that own nothing do not read the retry flag": (
        "resident/backward.cuh",
        ("again = *Clip::retry_flag(turn, place);", "again = false;"),
    ),
    "clipped twice": (
        "resident/clipping.cuh",
        ("scale[e] = large_[e] ? 1.0f : scale[e];", "scale[e] = scale[e];"),
    ),
    "the next phase is expected before this one ends": (
        "resident/forward.cuh",
        ("    Exchange<K>::expect_state(i, place);\n", ""),
        (
            "    Exchange<K>::await_state(i);",
            "    Exchange<K>::expect_state(i, place);\n    Exchange<K>::await_state(i);",
        ),
    ),
    "one half of the state, read late": (
        "resident/exchange.cuh",
        ("(K::kState) + turn % 2 * K::kStateWords", "(K::kState) + turn * 0"),
    ),
    "columns are sent that nobody expects": (
        "resident/exchange_cluster.cuh",
        ("if (Mode::column(place.lane) < place.rows) {", "{"),
    ),
    "a block ends early": (
        "resident/forward.cuh",
        (
            "    Exchange<K>::await_state(i);",
            "    if (place.block_unit > 0 && i + 1 == steps) return;\n"
            "    Exchange<K>::await_state(i);",
        ),
    ),
    "no barrier of the band": (
        "resident/product.cuh",
        ("rt::sync_threads(1 + band, K::kParts * 32);", ""),
    ),
    "stores before all mbarriers are made": (
        "resident/exchange_cluster.cuh",
        ("    rt::sync_cluster();\n", ""),
    ),
    "the state of the last step is sent": (
        "resident/forward.cuh",
        ("if (K::kBlocks == 1 || i + 1 < steps) put_seen", "put_seen"),
    ),
}
FAULTS_OF_STREAMING = {
    "no barrier before the parts are added": (
        "streaming/product.cuh",
        ("    rt::sync_block();  // all warps write their parts", "    //"),
    ),
    "no barrier between a block's sums": (
        "streaming/product.cuh",
        ("  rt::sync_block();  // all warps write their sums", "  //"),
    ),
    "one half of the state": (
        "streaming/product.cuh",
        ("std::int64_t{i % 2} * groups", "i * 0 * groups"),
    ),
    "the last step of a product left out": (
        "streaming/product.cuh",
        ("end = steps * (warp + 1) / kWarps;", "end = (steps - 1) * (warp + 1) / kWarps;"),
    ),
    "another slice's place": (
        "streaming/forward.cuh",
        (
            "const Place<K> place(a.shape, tile, strip.slice);\n    const int t = forward",
            "const Place<K> place(a.shape, tile, 0);\n    const int t = forward",
        ),
    ),
    "a slice past the last": (
        "streaming/product.cuh",
        ("return tile < w.tiles && slice < w.slices;", "return tile < w.tiles;"),
    ),
    "a row that has not begun forgets h_0": (
        "streaming/forward.cuh",
        ("if (rt::any(waits != 0)) {", "if (rt::any(waits != 0) && i < 0) {"),
    ),
    "dh_0 of the last launch alone": (
        "streaming/backward.cuh",
        ("row.begun = i > 0 &&", "row.begun = i == a.shape.steps &&"),
    ),
    "dgamma of the last step alone": (
        "streaming/backward.cuh",
        ("gain[k] + (step.i > 0 ? a.dgamma[unit] : 0.0f);", "gain[k];"),
    ),
    "a mean that is not clipped": (
        "streaming/backward.cuh",
        (
            "mean[e] = (large ? sums[4][e] : sums[2][e]) * factor;",
            "mean[e] = (large ? sums[4][e] : sums[2][e]) * a.shape.inv_size;",
        ),
    ),
    "a launch too few": (
        "streaming/kernels.cu",
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
