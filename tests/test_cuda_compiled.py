"""What nvcc makes of the CUDA kernels: no registers in local memory, tensor cores, weights that are
read once, no fence in the time loop. tests/sass/recorded.json has all kernels."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rnnfast.backends import cuda

pytest.importorskip("rnnfast._C")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/sass"))

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs cuobjdump, which Triton brings along", allow_module_level=True)

import record_sass as record  # noqa: E402
import sass  # noqa: E402

TABLE = json.loads(record.RECORDED.read_text())
ROWS = {name: sass.Figures(*row) for name, row in TABLE["kernels"].items()}


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
    """Else: make extension && .venv/bin/python tests/sass/record_sass.py"""
    assert TABLE["sources"] == record.sources()
    assert tuple(TABLE["columns"]) == sass.Figures._fields
    # Modes by sizes by forward (layer norm or not) and backward (layer norm, clipping, or not).
    assert len(ROWS) == 3 * (2 * 4 + 2 * 3) * 6


def test_no_register_is_kept_in_local_memory():
    assert not [name for name, row in ROWS.items() if row.spills or row.stack]


def test_products_are_of_tensor_cores_and_all_of_them_there():
    for name, row in ROWS.items():
        _, mode, _, units, _, tiles, *_ = name.split()
        depth, each = {"tf32": (8, 1), "exact": (16, 6)}.get(mode, (16, 1))
        assert row.products == int(units) // depth * int(tiles) * each, name


def test_nothing_in_the_time_loop_waits_for_memory():
    """One barrier a step, one more for layer norm, for clipping; no fence."""
    assert not [name for name, row in ROWS.items() if row.fences]
    for name, row in ROWS.items():
        assert row.barriers == 1 + ("norm" in name) + ("clip" in name), name


def test_weights_are_not_read_again():
    """A thread reads as much in a step of 128 units as of 32, of which it has a quarter of the
    weights; of 256 units twice as much, since it has two tiles."""
    for name, row in ROWS.items():
        smallest = ROWS[re.sub(r"\d+ units \d+ tiles", "32 units 1 tiles", name)]
        tiles = int(re.search(r"(\d+) tiles", name)[1])
        assert row.loads <= tiles * smallest.loads + 8, name


def test_plan_and_readme_say_what_the_model_of_the_code_does():
    device = cuda.Device("H100", 90, 132, 48 << 10)
    for name, row in ROWS.items():
        arch, mode, which, units, _, _, _, *options = name.split()
        if arch == "sm_90" and which == "forward":
            plan = cuda._plan(mode, int(units), 1, 8, options == ["norm"], device)
            assert plan.cycles == pytest.approx(row.cycles, rel=0.15), name
    cycles = ROWS["sm_90 bfloat16 forward 256 units 2 tiles"].cycles
    assert f"predicts {cycles} cycles for a step" in (ROOT / "README.md").read_text()


@needs_objects
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiler_makes_what_the_table_says(arch, tmp_path):
    objects = record.objects()
    if f".{arch}.cubin" not in sass.run("cuobjdump", "-lelf", objects / "single_block.exact.o"):
        pytest.skip(f"the extension was not compiled for {arch}")
    found = sass.table(objects, arch, tmp_path)
    assert found == {name: row for name, row in ROWS.items() if name.startswith(f"{arch} ")}


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


def test_kernels_are_compiled_once_a_mode_and_linked_with_the_static_runtime(tmp_path):
    package = sass.package
    nvcc = package.Nvcc(["nvcc"], "", ["sm_80", "sm_90"], ["/cuda/lib"])
    compiler = package.Compiler(["c++"], "", "x86_64-linux-gnu")
    *steps, link = package.extension_steps(compiler, str(tmp_path), "_C.so", nvcc)
    kernels = [step for step in steps if step.command[0] == "nvcc"]
    assert len(kernels) == len(package.CUDA_MODES)
    assert {"-lcudart_static", "-L/cuda/lib"} <= set(link.command)
