"""Prints, as JSON, a hash of the program that Triton optimizes for each variant of a source tree.

    .venv/bin/python tests/proof/cubins/programs.py ROOT

The hash is of Triton's IR, after its own passes and before those for a GPU. Source positions are
left out, constants stand in the place of their names, and values are numbered in order. Two trees
with one hash give the same machine code: all later stages depend on this IR and on the options.
A program is made once for all GPUs: up to here they differ in types (fp8) that no kernel uses.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path


def numbered(text: str) -> str:
    constants: dict[str, str] = {}
    names: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        found = re.match(r"\s*(%\w+) = arith\.constant (.*)$", line)
        if found:
            constants[found[1]] = found[2]
        else:
            lines.append(line)

    def replaced(found: re.Match) -> str:
        name = found[0]
        return constants[name] if name in constants else names.setdefault(name, f"%{len(names)}")

    return "\n".join(re.sub(r"%\w+", replaced, line) for line in lines)


def main(root: str) -> None:
    folder = next(Path(root).glob("tests/**/cubins/variants.py")).parent
    sys.path[:0] = [root, str(folder)]
    import variants

    made: dict[tuple, str] = {}
    found = {}
    for capability in variants.DEVICES:
        for name, launch in variants.variants(capability).items():
            source = variants.source(launch)
            key = source.hash(), str(sorted(launch.options.items()))
            if key not in made:
                text = f"{key[1]}\n{numbered(optimized(source, launch.options, capability))}"
                made[key] = hashlib.sha256(text.encode()).hexdigest()
            found[name] = made[key]
    print(json.dumps(found))


def optimized(source, launch_options: dict, capability: int) -> str:
    """Triton's IR of a variant."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options(launch_options)
    stages, context = {}, ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    code = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, code, backend.get_module_map(), context)
    return stages["ttir"](module, {"target": target, **options.__dict__}).str_nodebug()


if __name__ == "__main__":
    main(sys.argv[1])
