"""Type checkers read a user's script (typed.py), with rnnfast as it is installed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import rnnfast
from rnnfast import argument_types as choices
from rnnfast.backends import BACKENDS
from rnnfast.cells.rnn import NONLINEARITIES
from rnnfast.modules import settings

pytestmark = pytest.mark.proof

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "tools" / "typed.py"


def check(command: list[str | Path]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def mypy(script: Path, folder: Path) -> subprocess.CompletedProcess:
    return check(["mypy", "--strict", "--cache-dir", folder / "mypy", script])


def pyright(script: Path, folder: Path) -> subprocess.CompletedProcess:
    config = {
        "include": [str(script)],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": False,  # those are for mypy
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    return check(["basedpyright", "-p", folder, "--pythonpath", sys.executable])


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_users_script_has_types(checker, tmp_path):
    pytest.importorskip("mypy" if checker is mypy else "basedpyright")
    done = checker(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checker_sees_rnnfast(tmp_path):
    """It would find nothing wrong where all of rnnfast is Any."""
    pytest.importorskip("basedpyright")
    script = tmp_path / "script.py"
    script.write_text("import rnnfast\n\nnumber: int = rnnfast.RNN(8, 16)\n")
    done = pyright(script, tmp_path)
    assert done.returncode == 1
    assert '"RNN" is not assignable to declared type "int"' in done.stdout.replace("\n", " ")


def test_the_names_that_a_checker_knows_are_those_that_are_taken():
    assert list(get_args(choices.Nonlinearity)) == list(NONLINEARITIES)
    assert (None, *get_args(choices.Norm)) == settings.CHOICES["norm"]
    assert list(get_args(choices.Init)) == list(settings.CHOICES["init"])
    assert list(get_args(choices.Backend)) == ["auto", *BACKENDS]
    assert settings.CHOICES["track_gradient_flow"] == (False, True, "sample")


def test_replace_takes_arguments_of_rnn_with_its_types():
    ours = inspect.signature(rnnfast.RNN).parameters
    for name, annotation in rnnfast.convert.Options.__annotations__.items():
        assert annotation.__forward_arg__ == ours[name].annotation, name
