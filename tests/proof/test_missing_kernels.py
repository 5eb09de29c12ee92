"""A package whose extension was not built, or does not load: it says so once, and works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGE = "rnnfast has no compiled kernels"
# An editable installation finds what this folder does not have in its own sources.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""
CALL = "import torch, rnnfast; rnnfast.RNN(3, 4)(torch.randn(5, 2, 3)); print(rnnfast.info())"


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder with this package, without what a build puts into it."""
    ignored = shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
    for name in ("rnnfast", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "sitecustomize.py").write_text(NO_EDITABLE)
    return tmp_path


def report(folder: Path, **report: object) -> None:
    (folder / "rnnfast" / "_build.json").write_text(json.dumps(report))


def run(folder: Path, code: str = CALL, *options: str, **environment: str):
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONWARNINGS": ""} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "reason",
    ["no C++ compiler: none of c++, g++, clang++ is on the PATH", "pybind11 is not installed"],
)
def test_import_warns_once_with_the_reason_and_the_cost(unbuilt, reason):
    report(unbuilt, extension=False, reason=reason)
    done = run(unbuilt)
    assert done.stderr.count(f"RuntimeWarning: {MESSAGE}") == 1
    assert f"{MESSAGE}: {reason}. On the CPU torch's own kernels are used instead" in done.stderr
    assert "up to tens of times slower" in done.stderr
    assert done.stderr.startswith("<string>:1: RuntimeWarning")  # the line that imports rnnfast
    assert reason in done.stdout  # of rnnfast.info()


def test_the_warning_can_be_silenced_as_it_says(unbuilt):
    report(unbuilt, extension=False, reason="pybind11 is not installed")
    said = run(unbuilt).stderr
    variable = said[said.index("PYTHONWARNINGS='") :].split("'")[1]
    assert run(unbuilt, PYTHONWARNINGS=variable).stderr == ""
    code = f"import warnings; warnings.filterwarnings('ignore', {MESSAGE!r}); {CALL}"
    assert run(unbuilt, code).stderr == ""


def test_sources_that_were_never_built_say_so(unbuilt):
    assert (
        f"{MESSAGE}: No module named 'rnnfast._C': these sources were never" in run(unbuilt).stderr
    )


def test_an_extension_for_another_python_is_named(unbuilt):
    report(unbuilt, extension=True, reason=None)
    (unbuilt / "rnnfast" / "_C.cpython-38-x86_64-linux-gnu.so").touch()
    assert "loads no _C.cpython-38-x86_64-linux-gnu.so" in run(unbuilt).stderr


def test_an_extension_that_does_not_load_says_why(unbuilt):
    report(unbuilt, extension=True, reason=None)
    (unbuilt / "rnnfast" / "_C.py").write_text("raise ImportError('GLIBCXX_3.4.99 not found')")
    assert f"{MESSAGE}: GLIBCXX_3.4.99 not found" in run(unbuilt).stderr


def test_the_test_suite_runs_without_the_extension(unbuilt):
    tests = (f"tests/{name}.py" for name in ("conftest", "cases", "modules/test_reset_parameters"))
    for name in ("pyproject.toml", *tests):
        (unbuilt / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, unbuilt / name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=unbuilt,
        env=os.environ | {"PYTHONPATH": str(unbuilt), "RNNFAST_REQUIRE_EXTENSION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_with_its_kernels_says_nothing():
    pytest.importorskip("rnnfast._C")
    done = run(ROOT, "import rnnfast", "-W", "error")
    assert done.stderr == ""
