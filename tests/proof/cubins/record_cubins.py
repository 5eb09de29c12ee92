"""Writes recorded.json: what the compiler makes of every variant, for three architectures.

    .venv/bin/python tests/proof/cubins/record_cubins.py

Half an hour on two cores; to be run again after every change of the kernels, which the tests ask
for by the hash of their sources.
"""

from __future__ import annotations

import ast
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from tqdm import tqdm
from variants import DEVICES, Figures, compile_for, variants

from rnnfast import triton_kernels

RECORDED = Path(__file__).with_name("recorded.json")


def sources() -> str:
    """A hash of what is compiled, words aside."""
    code = []
    for file in sorted(Path(triton_kernels.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and ast.unparse(body[:1]).startswith(('"', "'")):
                node.body = body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return hashlib.sha256("".join(code).encode()).hexdigest()


def figures(capability: int, name: str) -> Figures:
    return compile_for(variants(capability)[name], capability)[0]


def main() -> None:
    jobs = [(capability, name) for capability in DEVICES for name in variants(capability)]
    with ProcessPoolExecutor(2) as pool:
        found = list(tqdm(pool.map(figures, *zip(*jobs)), total=len(jobs)))
    rows = {name: list(f) for (_, name), f in zip(jobs, found)}
    table = {"triton": triton.__version__, "sources": sources(), "columns": Figures._fields}
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = json.dumps(table)[:-1]
    RECORDED.write_text(f'{head}, "variants": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
