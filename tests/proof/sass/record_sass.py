"""Writes recorded.json: what nvcc makes of every CUDA kernel, for three architectures.

    make extension && .venv/bin/python tests/proof/sass/record_sass.py

A minute; to be run again after every change of the kernels, which the tests ask for by the hash of
their sources. sm_100 is compiled from the PTX, as its driver does.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path

from sass import ROOT, Figures, nvcc, table

RECORDED = Path(__file__).with_name("recorded.json")
CELLS = [ROOT / "csrc/cells" / name for name in ("nonlinearity.h", "rnn.h")]
ARCHS = ("sm_80", "sm_90", "sm_100")


def sources() -> str:
    """A hash of what is compiled, words aside."""
    kernels = sorted((ROOT / "csrc/cuda").rglob("*.*h"))
    # No kernel is made of the host's files, except of the sizes in the plan.
    files = [f for f in kernels if f.parent.name != "host" or f.name == "plan.h"]
    code = [re.sub(r"//.*|\s+", "", f.read_text()) for f in [*files, *CELLS]]
    return hashlib.sha256("".join(code).encode()).hexdigest()


def objects() -> Path | None:
    """The folder of the extension's objects, where nvcc has made some."""
    found = sorted((ROOT / "build/native").glob("*/cluster.forward.exact.o"))
    return found[-1].parent if found else None


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            rows |= table(objects(), arch, Path(folder))
    head = {"nvcc": nvcc().version, "sources": sources(), "columns": Figures._fields}
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    RECORDED.write_text(f'{json.dumps(head)[:-1]}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
