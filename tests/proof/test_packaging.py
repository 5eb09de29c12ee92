"""A user's pip: sdist, wheel, editable installation, with a C++ compiler and without."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)

TRAIN = """
import torch, rnnfast, rnnfast._C
rnn = rnnfast.RNN(3, 5, backend="cpu")
y, h = rnn(torch.randn(7, 2, 3))
(y.sum() + h.sum()).backward()
assert y.shape == (7, 2, 5), y.shape
assert all(p.grad.isfinite().all() and p.grad.any() for p in rnn.parameters())
print(rnnfast.__file__)
"""
IMPORT_TIME = """
import time, torch
start = time.perf_counter()
import rnnfast
print(time.perf_counter() - start)
"""


def run(
    *command: str | Path, cwd: Path, status: int = 0, **changes: str
) -> subprocess.CompletedProcess:
    """`command` in `cwd`, which must end with `status` (-1: any but 0), with its environment
    changed."""
    environment = os.environ | {
        "RNNFAST_REQUIRE_EXTENSION": "0",
        "RNNFAST_CUDA": "0",  # minutes, wherever nvcc is
        "CXXFLAGS": "-O1",  # behind the -O3 of setup.py: a minute less
        "PYTHONPATH": "",
        "PATH": sysconfig.get_path("scripts")
        + os.pathsep
        + os.environ["PATH"],  # one ninja for all
        **changes,
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    as_expected = done.returncode == status if status >= 0 else done.returncode != 0
    assert as_expected, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment(folder: Path) -> Path:
    """The Python of a new environment without rnnfast, which finds torch and the build tools in
    the one that runs the tests, so that nothing is downloaded."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix"  # Python 3.10
    site = Path(sysconfig.get_path("purelib", scheme, vars=paths))
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # As a line of a .pth file: then the .pth files over there (an editable rnnfast) are not read.
    (site / "tests.pth").write_text("\n".join(sorted(here)) + "\n")
    assert run(python, "-c", "import torch", cwd=folder)
    run(python, "-c", "import rnnfast", cwd=folder, status=1)
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git has, or would take: no leftovers of builds."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = run(
        *("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), cwd=ROOT
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out),
        *("--config-setting=--quiet", checkout),
        cwd=out,
    )
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    """Built from the sdist, which keeps the objects for the editable installation."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", out, unpacked),
        cwd=out,
        RNNFAST_REQUIRE_EXTENSION="1",
    )
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    python = environment(tmp_path_factory.mktemp("installed"))
    run(python, *PIP, "install", *OFFLINE, "--ignore-installed", wheel, cwd=wheel.parent)
    return python


def test_sdist_holds_all_that_a_wheel_is_made_of(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "triton_kernels", "rnnfast")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".typed"}
    }
    assert "csrc/bindings.cpp" in sources
    assert "triton_kernels/__init__.py" in sources
    assert sources <= names, sorted(sources - names)
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    built = {name for name in names if name.endswith((".so", ".pyc", "_build.json"))}
    assert not built


@needs_compiler
def test_wheel_holds_no_top_level_name_but_rnnfast(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"rnnfast", f"rnnfast-{wheel.name.split('-')[1]}.dist-info"}
    assert "rnnfast/py.typed" in names
    assert "rnnfast/triton_kernels/__init__.py" in names
    assert any(name.startswith("rnnfast/_C.") for name in names)


@needs_compiler
def test_wheel_says_how_it_was_compiled(wheel):
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("rnnfast/_build.json"))
    assert report["extension"] is True
    assert report["compiler"]
    assert report["simd"][0] == "portable"
    assert "native" not in report["flags"]
    assert "openmp" not in report["flags"]


@needs_compiler
def test_wheel_from_the_sdist_trains_far_from_the_sources(installed, tmp_path):
    file = run(installed, "-c", TRAIN, cwd=tmp_path).stdout.strip()
    assert Path(file).is_relative_to(installed.parents[1])


@needs_compiler
def test_the_installation_makes_a_command(installed, tmp_path):
    script = installed.with_name("rnnfast")
    version = run(script, "--version", cwd=tmp_path).stdout
    assert version == run(installed, "-m", "rnnfast", "--version", cwd=tmp_path).stdout
    assert re.fullmatch(r"rnnfast \d+\.\d+\.\d+\n", version)
    assert run(script, cwd=tmp_path, status=2).stderr.startswith("usage: rnnfast [-h]")
    assert "extension: rnnfast._C" in run(script, "info", cwd=tmp_path).stdout


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is a tag of Linux")
def test_auditwheel_gives_the_wheel_a_manylinux_tag_and_it_still_trains(wheel, tmp_path):
    pytest.importorskip("auditwheel")
    out = tmp_path / "dist"
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, cwd=tmp_path)
    (repaired,) = out.iterdir()
    assert "-manylinux_" in repaired.name
    assert "linux_x86_64" not in repaired.name.split("-")[-1].split(".")
    with zipfile.ZipFile(repaired) as archive:  # the C++ runtime of the system, no copy of it
        assert not [name for name in archive.namelist() if "rnnfast.libs" in name]
    python = environment(tmp_path / "clean")
    run(python, *PIP, "install", *OFFLINE, "--ignore-installed", repaired, cwd=tmp_path)
    file = run(python, "-c", TRAIN, cwd=tmp_path).stdout.strip()
    assert Path(file).is_relative_to(python.parents[1])


@needs_compiler
def test_import_costs_under_150_ms_beyond_torch(installed, tmp_path):
    """In one process after torch, so that the noise of torch's own seconds stays out of it."""
    times = [float(run(installed, "-c", IMPORT_TIME, cwd=tmp_path).stdout) for _ in range(3)]
    assert statistics.median(times) < 0.150, times


@needs_compiler
def test_editable_installation_trains_and_sees_triton_kernels(
    wheel, unpacked, tmp_path_factory, tmp_path
):
    """In the tree that the wheel was made of: nothing is compiled a second time."""
    del wheel
    (module,) = unpacked.glob("build/native/*/_C.*")
    compiled = module.stat().st_mtime_ns
    python = environment(tmp_path_factory.mktemp("editable"))
    run(
        *(python, *PIP, "install", *OFFLINE, "--ignore-installed", "--editable", unpacked),
        cwd=tmp_path,
        RNNFAST_REQUIRE_EXTENSION="1",
    )
    assert module.stat().st_mtime_ns == compiled
    file = run(python, "-c", TRAIN, cwd=tmp_path).stdout.strip()
    assert Path(file) == unpacked / "rnnfast" / "__init__.py"
    code = "import rnnfast.triton_kernels as kernels; print(kernels.__file__)"
    file = run(python, "-c", code, cwd=tmp_path).stdout.strip()
    assert Path(file) == unpacked / "triton_kernels" / "__init__.py"


@needs_compiler
def test_what_is_compiled_for_newer_processors_is_called_by_name_only(wheel, unpacked):
    """The linker keeps one of several equal inline functions: were it the one compiled with
    AVX-512, an older processor would meet its instructions in code for every processor."""
    del wheel
    if not shutil.which("nm"):
        pytest.skip("no nm")
    (folder,) = unpacked.glob("build/native/*")
    inline: dict[str, set[str]] = {}
    for file in folder.glob("*.o"):
        symbols = run("nm", "--defined-only", file, cwd=folder).stdout.splitlines()
        fields = [symbol.split() for symbol in symbols]
        inline[file.name] = {name for _, kind, name in fields if kind in "Wu"}
    newer = [name for name in inline if name in {"kernels.avx2.o", "kernels.avx512.o"}]
    for file in newer:
        for other in inline.keys() - {file}:
            assert not inline[file] & inline[other], (file, other)


def failing_compiler(folder: Path) -> str:
    """Answers as GCC does, and cannot compile."""
    file = folder / "broken-c++"
    file.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'broken (GCC) 0.0' ;;\n"
        "  -dumpmachine) echo x86_64-linux-gnu ;;\n"
        "  *) echo 'fatal error: no space for cc1plus' >&2; exit 4 ;;\n"
        "esac\n"
    )
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize("missing", [False, True], ids=["failing", "missing"])
def test_without_a_compiler_the_installation_works_and_says_why(checkout, tmp_path, missing):
    compiler = str(tmp_path / "no-such-c++") if missing else failing_compiler(tmp_path)
    said = compiler if missing else "no space for cc1plus"
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    python = environment(tmp_path / "environment")
    installation = run(
        *(python, *PIP, "install", *OFFLINE, "--ignore-installed", "--verbose", source),
        cwd=tmp_path,
        CXX=compiler,
    )
    assert "WITHOUT its compiled kernels" in installation.stdout + installation.stderr
    code = "import rnnfast; print(rnnfast.RNN(2, 3)); print(rnnfast.info())"
    done = run(python, "-c", code, cwd=tmp_path)
    assert said in done.stdout
    assert "RuntimeWarning: rnnfast has no compiled kernels" in done.stderr
    assert said in done.stderr
    (report,) = (tmp_path / "environment").rglob("_build.json")
    report = json.loads(report.read_text())
    assert report["extension"] is False
    assert said in report["reason"]


def test_a_required_extension_that_does_not_compile_fails_the_installation(checkout, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    failed = run(
        *(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path / "out", source),
        cwd=tmp_path,
        status=-1,
        CXX=failing_compiler(tmp_path),
        RNNFAST_REQUIRE_EXTENSION="1",
    )
    assert "RNNFAST_REQUIRE_EXTENSION is set" in failed.stdout + failed.stderr


def test_a_failed_rebuild_leaves_no_stale_extension(checkout, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    stale = source / "rnnfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"of an earlier build")
    build = ("setup.py", "--quiet", "build_ext", "--inplace")
    run(sys.executable, *build, cwd=source, CXX=failing_compiler(tmp_path))
    assert not stale.exists()


def test_the_top_level_name_triton_kernels_is_refused(tmp_path):
    failed = run(sys.executable, "-c", "import triton_kernels", cwd=ROOT, status=1)
    assert "import them as rnnfast.triton_kernels" in failed.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(), reason="there is a GPU"
)
def test_make_demo_compiles_nothing_for_gpus_where_there_is_none():
    """nvcc takes minutes. Somebody who sets RNNFAST_CUDA has the last word."""
    unset = {name: value for name, value in os.environ.items() if name != "RNNFAST_CUDA"}
    for given, wanted in ({}, "0"), ({"RNNFAST_CUDA": "1"}, "1"):
        done = subprocess.run(
            ["make", "-pn", "demo"], cwd=ROOT, env=unset | given, capture_output=True, text=True
        )
        assert f"RNNFAST_CUDA = {wanted}" in done.stdout, done.stderr


def test_a_build_shows_each_line_of_the_compiler_as_it_comes(tmp_path):
    """And ends in the error that it found."""
    code = (
        "import setup, sys\n"
        "say = 'import sys; print(1, flush=True); sys.stdin.read(); print(2); sys.exit(3)'\n"
        "try:\n"
        "    setup.run([sys.executable, '-c', say], 'complaint', show=True)\n"
        "except setup.Unavailable as error:\n"
        "    print(error)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "1\n"  # while the command waits
        rest, _ = process.communicate()
    assert rest.startswith("2\ncomplaint: ")
    assert rest.count("2\n") == 2
