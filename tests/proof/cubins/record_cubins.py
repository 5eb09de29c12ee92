"""Writes recorded.json: what the compiler makes of every variant, for three architectures.

    .venv/bin/python tests/proof/cubins/record_cubins.py [--processes N] [--same-as COMMIT]

An hour of CPU time. Run it after every change of the kernels: the tests compare a hash of their
sources. With --same-as it takes three minutes where no program has changed: the variants whose
program (programs.py) is that of COMMIT keep the row of COMMIT's table, and only the others are
compiled.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import triton
from tqdm import tqdm

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from variants import DEVICES, Figures, compile_for, variants  # noqa: E402

from rnnfast import triton_kernels  # noqa: E402

RECORDED = Path(__file__).with_name("recorded.json")


def sources() -> str:
    """A hash of what is compiled, without its words."""
    code = []
    for file in sorted(Path(triton_kernels.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and ast.unparse(body[:1]).startswith(('"', "'")):
                node.body = body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return hashlib.sha256("".join(code).encode()).hexdigest()


def figures(capability: int, name: str) -> Figures:
    return compile_for(variants(capability)[name], capability)[0]


def programs(root: Path) -> dict[str, str]:
    """Hashes of the programs of a source tree, by the name of the variant."""
    command = [sys.executable, str(Path(__file__).with_name("programs.py")), str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return json.loads(done.stdout)


def unchanged_rows(commit: str) -> dict[str, list[int]]:
    """The rows of the commit's table whose program is the same in this tree."""
    new = programs(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(subprocess.run, check=True, stdout=subprocess.PIPE)
        archive = run(["git", "archive", commit], cwd=ROOT).stdout
        run(["tar", "x", "-C", folder], input=archive)
        before = json.loads(next(Path(folder).glob("tests/**/cubins/recorded.json")).read_text())
        old = programs(Path(folder))
    assert before["triton"] == triton.__version__, "another version of Triton made that table"
    return {name: row for name, row in before["variants"].items() if old[name] == new.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--same-as", metavar="COMMIT")
    given = parser.parse_args()
    jobs = [(capability, name) for capability in DEVICES for name in variants(capability)]
    kept = unchanged_rows(given.same_as) if given.same_as else {}
    changed = [job for job in jobs if job[1] not in kept]
    print(f"{len(jobs)} variants, {len(changed)} to compile")
    rows = dict(kept)
    if changed:
        with ProcessPoolExecutor(given.processes) as pool:
            found = list(tqdm(pool.map(figures, *zip(*changed)), total=len(changed)))
        rows |= {name: list(f) for (_, name), f in zip(changed, found)}
    table = {"triton": triton.__version__, "sources": sources(), "columns": Figures._fields}
    lines = [f" {json.dumps(name)}: {json.dumps(rows[name])}" for _, name in jobs]
    head = json.dumps(table)[:-1]
    RECORDED.write_text(f'{head}, "variants": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
