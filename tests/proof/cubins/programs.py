"""Prints, as JSON, a hash of the program that Triton optimizes for each variant of a source tree.

    .venv/bin/python tests/proof/cubins/programs.py ROOT CAPABILITY

The hash is of Triton's IR, after its own passes and before those for a GPU. Source positions are
left out, constants stand in the place of their names, and values are numbered in order. Two trees
with one hash give the same machine code: all later stages depend on this IR and on the options.
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


def main(root: str, capability: int) -> None:
    folder = next(Path(root).glob("tests/**/cubins/variants.py")).parent
    sys.path[:0] = [root, str(folder)]
    import variants
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    found = {}
    for name, launch in variants.variants(capability).items():
        source = variants.source(launch)
        options = backend.parse_options(launch.options)
        stages, context = {}, ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        backend.add_stages(stages, options, source.language)
        code = backend.get_codegen_implementation(options)
        module = source.make_ir(target, options, code, backend.get_module_map(), context)
        module = stages["ttir"](module, {"target": target, **options.__dict__})
        text = f"{sorted(options.__dict__.items())}\n{numbered(module.str_nodebug())}"
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
