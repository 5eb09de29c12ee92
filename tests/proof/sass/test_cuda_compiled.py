"""The CUDA kernels, as nvcc compiles them: no registers in local memory, tensor cores, weights that
are read once, no fence in the time loop. recorded.json beside this file has all kernels."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rnnfast.backends import cuda_plan

pytest.importorskip("rnnfast._C")

ROOT = Path(__file__).resolve().parents[3]

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs cuobjdump, which Triton brings along", allow_module_level=True)

import record_sass as record  # noqa: E402
import sass  # noqa: E402

TABLE = json.loads(record.RECORDED.read_text())
ALL = {name: sass.Figures(*row) for name, row in TABLE["kernels"].items()}
STREAMING = {name: row for name, row in ALL.items() if "streaming" in name}
ROWS = {name: row for name, row in ALL.items() if name not in STREAMING}


def same_nvcc() -> bool:
    try:
        return sass.nvcc().version == TABLE["nvcc"]
    except sass.package.Unavailable:
        return False


needs_objects = pytest.mark.skipif(
    record.objects() is None or not same_nvcc(),
    reason=f"needs the extension's objects, of {TABLE['nvcc']}",
)


def test_table_is_of_these_kernels():
    """If this fails, run make extension && .venv/bin/python tests/proof/sass/record_sass.py"""
    assert TABLE["sources"] == record.sources()
    assert tuple(TABLE["columns"]) == sass.Figures._fields
    # Sizes by forward (layer norm or not) and backward (layer norm, clipping, or not); sm_80 has no
    # clusters.
    assert len(ROWS) == (3 * (2 * 4 + 2 * 3) + 2 * (2 * 10 + 5 + 4)) * 6
    # Blocks by forward and backward; W packed, transposed or not, the beginning and two endings.
    assert len(STREAMING) == 3 * (2 * (3 * 6 + 5) + 4 * 5)


def test_no_register_is_kept_in_local_memory():
    assert not [name for name, row in ALL.items() if row.spills or row.stack]


def test_products_are_of_tensor_cores_and_all_of_them_there():
    """Over the warps of all blocks, a group's weights times eight columns."""
    for name, row in ROWS.items():
        _, mode, _, units, _, blocks, *_ = name.split()
        depth, each = {"tf32": (8, 1), "exact": (16, 6)}.get(mode, (16, 1))
        wanted = (int(units) // 16) * (int(units) // depth) * each
        assert row.products * row.warps * int(blocks) == wanted, name


def test_loop_of_a_streamed_product_multiplies_all_that_it_loads():
    """With no barrier and no fence; where it is unrolled, a multiple."""
    for name, row in STREAMING.items():
        _, mode, _, which, *block = name.split()
        if which not in ("forward", "backward"):
            continue
        tiles, slices = (int(n) // of for n, of in zip(block[0].split("x"), (16, 8)))
        each = 6 if mode == "exact" else 1
        weights, state = (48, 24) if mode == "exact" else (16, 8)
        turns = row.products / (tiles * slices * each)
        assert turns in (2, 4, 8), name
        assert row.loads == turns * (tiles * weights + slices * state), name
        assert (row.barriers, row.fences) == (0, 0), name


def test_nothing_in_the_time_loop_waits_for_memory():
    """One barrier a step (of a cluster: its mbarrier, and the band's), one more for layer norm; of
    a cluster one more for clipping, but for the one of both together where registers are not
    scarcest; no fence."""
    assert not [name for name, row in ROWS.items() if row.fences]
    large = "1024 units 8 blocks", "1280 units 16 blocks"
    scarce = {
        *(f"{mode} backward {cluster}" for mode in ("bfloat16", "float16") for cluster in large),
        "tf32 backward 1024 units 16 blocks",
        "exact backward 512 units 8 blocks",
        "exact backward 768 units 16 blocks",
    }
    for name, row in ROWS.items():
        cluster, norm = " 1 blocks" not in name, "norm" in name
        _, kernel = name.removesuffix(" clip").removesuffix(" norm").split(" ", 1)
        clip = "clip" in name and cluster and not (norm and kernel not in scarce)
        assert row.barriers == 1 + cluster + norm + clip, name


def test_weights_are_not_read_again():
    """A thread reads as much in a step of any size as in one of 32 units, of which it has few of
    the weights; of 256 units in a block twice as much, since it has two tiles."""
    for name, row in ROWS.items():
        smallest = ROWS[
            re.sub(r"\d+ units \d+ blocks", "32 units 1 blocks", name).replace("sm_100", "sm_90")
        ]
        tiles = 2 if "256 units 1 blocks" in name else 1
        assert row.loads <= tiles * smallest.loads + 8, name


def test_plan_and_page_say_what_the_model_of_the_code_does():
    """The plan's estimate has what comes into a block of all columns on top, which no model of the
    code knows."""
    device = cuda_plan.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))
    for name, row in ROWS.items():
        arch, mode, which, units, _, blocks, _, *options = name.split()
        if arch == "sm_90" and which == "forward":
            plan = cuda_plan.plan_for(
                mode, int(units), 1, 1, options == ["norm"], device, (int(blocks), 1)
            )
            assert plan.units == int(units)
            assert plan.cycles == pytest.approx(row.cycles, rel=0.2), name
    page = (ROOT / "docs/gpu.md").read_text()
    for units, blocks in ((256, 1), (256, 4), (512, 16), (1024, 16)):
        cycles = ROWS[f"sm_90 bfloat16 forward {units} units {blocks} blocks"].cycles
        assert f"| {units} | {blocks} | {cycles} |" in page


@needs_objects
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiler_makes_what_the_table_says(arch, tmp_path):
    """One mode: all of them take a minute. sm_90 comes from PTX where nothing else is built."""
    mode, objects = "exact", record.objects()
    there = sass.run("cuobjdump", "-lelf", objects / "cuda_measure.o")
    if arch == "sm_80" and f".{arch}.cubin" not in there:
        pytest.skip(f"the extension was not compiled for {arch}")
    found = sass.table(objects, arch, tmp_path, [mode])
    begin = f"{arch} {mode} "
    assert found == {name: row for name, row in ALL.items() if name.startswith(begin)}


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@needs_nvcc
def test_exchange_of_a_cluster_has_no_fence_in_its_loop(tmp_path):
    """tests/cpp/emulated/ring.cuh, which does what the cluster kernels will do."""
    source, cubin = tmp_path / "ring.cu", tmp_path / "ring.cubin"
    source.write_text(f'#include "{ROOT}/tests/cpp/emulated/ring.cuh"\n')
    command = ["nvcc", "-std=c++20", "-O3", "-arch=sm_90", "-cubin", f"-I{ROOT}/csrc"]
    subprocess.run([*command, "-o", cubin, source], check=True)
    (code,) = sass.disassembled(cubin).values()
    kinds = {i.kind for i in sass.time_loop(code, "STAS")}
    assert "SYNCS" in kinds
    assert not kinds & {"MEMBAR", "ERRBAR", "CCTL"}


# -------------------------------------------------------------------------------- how it is built


def test_what_nvcc_is_asked_for(monkeypatch):
    package = sass.package
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(package.Unavailable, match="no CUDA compiler: /nowhere/nvcc is not"):
        sass.nvcc()
    monkeypatch.setenv("NVCC", "true")  # says nothing of itself
    monkeypatch.setenv("RNNFAST_CUDA_ARCHS", "sm_90,hopper")
    with pytest.raises(package.Unavailable, match="RNNFAST_CUDA_ARCHS: given 'hopper', wanted"):
        sass.nvcc()
    nvcc = package.Nvcc(["nvcc"], "", ["sm_80", "compute_90"], [])
    wanted = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=compute_90"
    assert nvcc.gencode() == wanted.split()
    assert package.Nvcc(["nvcc"], "", ["native"], []).gencode() == ["-arch=native"]


FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V"; echo "Build x" ;;
  *) echo '"-L{folder}"' ;;
esac
"""


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        ("12.6", "sm_80 sm_90 compute_90"),
        ("12.8", "sm_80 sm_90 sm_100 sm_120 compute_90"),
        ("13.0", "sm_80 sm_90 sm_100 sm_120 compute_90"),
    ],
)
def test_blackwell_has_code_where_nvcc_knows_it(release, wanted, monkeypatch, tmp_path):
    """From PTX alone, the first call would compile for 17 s."""
    package = sass.package
    (tmp_path / "libcudart_static.a").touch()
    fake = tmp_path / "nvcc"
    fake.write_text(FAKE_NVCC.format(release=release, folder=tmp_path))
    fake.chmod(0o755)
    monkeypatch.setenv("NVCC", str(fake))
    monkeypatch.delenv("RNNFAST_CUDA_ARCHS", raising=False)
    compiler = package.Compiler(["c++"], "", "x86_64-linux-gnu")
    assert package.Nvcc.find(compiler).archs == wanted.split()


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("c++", "-ccbin c++"),
        ("ccache g++ --sysroot=/x", "-ccbin g++ -Xcompiler=--sysroot=/x"),
        ("distcc", "-ccbin distcc"),
    ],
)
def test_nvcc_gets_the_compiler_of_the_host(command, wanted):
    compiler = sass.package.Compiler(command.split(), "", "x86_64-linux-gnu")
    assert sass.package.host_flags(compiler) == wanted.split()


@pytest.mark.parametrize("wanted", ["", "0", "1"])
def test_extension_without_nvcc_says_why_or_fails(wanted, monkeypatch, tmp_path, capsys):
    package = sass.package
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("RNNFAST_CUDA", wanted)
    made = []
    monkeypatch.setattr(package, "make", lambda steps, folder: made.append(steps))
    monkeypatch.setattr(package, "load", lambda folder: None)
    compiler = package.Compiler(["c++"], "", "x86_64-linux-gnu")
    build = package.BuildExtension.build_cuda
    if wanted == "1":
        with pytest.raises(package.Unavailable, match="RNNFAST_CUDA is set, and no CUDA compiler"):
            build(None, compiler, str(tmp_path), "_C.so")
        assert not made
        return
    report = build(None, compiler, str(tmp_path), "_C.so")
    assert report["archs"] == []
    assert ("RNNFAST_CUDA=0 was set" if wanted else "no CUDA compiler") in report["reason"]
    assert report["reason"] in capsys.readouterr().out
    ((*_, link),) = made
    assert "-lcudart_static" not in link.command


def test_kernels_are_compiled_by_mode_and_pass_and_linked_with_the_static_runtime(tmp_path):
    package = sass.package
    nvcc = package.Nvcc(["nvcc"], "", ["sm_80", "sm_90"], ["/cuda/lib"])
    compiler = package.Compiler(["c++"], "", "x86_64-linux-gnu")
    *steps, link = package.extension_steps(compiler, str(tmp_path), "_C.so", nvcc)
    kernels = [step for step in steps if step.command[0] == "nvcc"]
    # Forward and backward of what keeps W_hh apart: as one, ptxas would take half a minute.
    assert len(kernels) == len(package.CUDA_MODES) * (2 + 2 + 1) + 1
    for step in kernels:
        clusters = "-DRNNFAST_FAMILY=cluster" in step.command
        assert ("arch=compute_80,code=sm_80" in step.command) != clusters
    assert {"-lcudart_static", "-L/cuda/lib"} <= set(link.command)
