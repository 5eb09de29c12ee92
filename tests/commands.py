"""``python -m rnnfast`` as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNBUILT = "ignore:rnnfast has no compiled kernels"  # proof/test_missing_kernels.py is about it


def command(*arguments: str, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    """``python -m rnnfast``, after the statements of ``prelude``; a warning is an error."""
    run = f"import runpy, sys; {prelude}; runpy.run_module('rnnfast', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", UNBUILT, "-c", run, *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def blocked(*names: str) -> str:
    """A prelude under which these cannot be imported: as if nobody had installed them."""
    find = f"lambda self, name, *_: names.block(name) if name in {set(names)} else None"
    block = "lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name, name=name))"
    return (
        f"names = type('Names', (), dict(find_spec={find}, block=staticmethod({block})))(); "
        "sys.meta_path.insert(0, names)"
    )
