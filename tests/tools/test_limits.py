"""No file and no function is too long to read, no private function takes too many parameters."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

import lizard
import pytest
from commands import ROOT

import rnnfast

FILE = {"tests": 600}  # lines, by top folder; every other: PRODUCT
PRODUCT = 500
FUNCTION = 120  # lines, signature and docstring among them
PARAMETERS = 8  # of a private function; signatures of the package are explicit
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
# Triton's kernels take each number by itself (triton_kernels/arguments.py says why).
LAUNCHED = {"resident", "tiled", "measure"}
# Kernels as they were sketched, for which nobody has a GPU.
SKETCHES = {"rnn_fwd_cluster.cuh", "rnn_bwd_cluster.cuh"}


def sources() -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = (Path(line) for line in done.stdout.splitlines())
    good = (p for p in paths if p.suffix in SUFFIXES and p.name not in SKETCHES)
    return [p.as_posix() for p in good if (ROOT / p).exists()]


def public() -> set[tuple[str, str]]:
    """File and name of each function that users call by its name."""
    found = set()
    for module in (rnnfast, rnnfast.functional, rnnfast.testing):
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            members = (
                inspect.getmembers(value, inspect.isfunction) if isinstance(value, type) else []
            )
            for function in (value, *(member for _, member in members)):
                if inspect.isfunction(inspect.unwrap(function)):
                    code = inspect.unwrap(function).__code__
                    found.add((code.co_filename, code.co_name))
    return found


if not (ROOT / ".git").exists():
    pytest.skip("git names the files, and this is no checkout", allow_module_level=True)
SOURCES = sources()
PUBLIC = public()


@pytest.mark.parametrize("path", SOURCES)
def test_file_and_its_functions_are_within_the_limits(path):
    lines = len((ROOT / path).read_text().splitlines())
    wrong = []
    if lines > FILE.get(path.split("/")[0], PRODUCT):
        wrong.append(f"{path}: {lines} lines")
    for function in lizard.analyze_file(str(ROOT / path)).function_list:
        where = f"{path}:{function.start_line} {function.name}"
        if function.length > FUNCTION:
            wrong.append(f"{where}: {function.length} lines")
        if path.startswith("triton_kernels/") and function.name in LAUNCHED:
            continue
        given = [name for name in function.parameters if name not in ("self", "cls")]
        if len(given) > PARAMETERS and (str(ROOT / path), function.name) not in PUBLIC:
            wrong.append(f"{where}: {len(given)} parameters")
    assert not wrong, "\n".join(wrong)


def test_a_public_function_is_known_as_one():
    names = {name for _, name in PUBLIC}
    assert {"rnn", "probe", "replace", "__init__", "forward"} <= names
