"""The Triton kernels as a call launches them, compiled ahead of time for GPUs that are not here.

What is compiled is what :mod:`rnnfast.backends.triton` launches on tensors without memory: the same
arguments, in the same types.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from rnnfast.triton_kernels.plan import Device, Plan
from rnnfast.triton_kernels.plan import choose as planned
from rnnfast.triton_kernels.record import measure
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnfast.backends import triton as backend
from rnnfast.recurrence.groups import (
    Kept,
    Options,
    OutputGradients,
    Rows,
    States,
    Wanted,
    Weights,
)
from rnnfast.recurrence.record import FIELDS

DEVICES = {  # by compute capability; what a block may ask for
    80: Device("A100", (8, 0), 108, 163 << 10),
    90: Device("H100", (9, 0), 132, 227 << 10),
    100: Device("B200", (10, 0), 148, 227 << 10),
}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    kernel: object
    grid: tuple[int, ...]
    arguments: dict
    options: dict
    plan: Plan | None  # of the kernels that compute

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"


class Figures(NamedTuple):
    registers: int
    stack: int
    spills: int  # loads and stores of local memory in the code
    shared: int  # bytes
    products: int  # tensor-core instructions
    global_loads: int  # instructions, in the whole kernel


@contextlib.contextmanager
def recorded(device: Device, tf32: bool = False) -> Iterator[list[Launch]]:
    """The launches of what is called inside, which run nothing."""
    found: list[Launch] = []

    plans: list[Plan] = []

    def run(kernel, grid, arguments, **options):
        plan = None if kernel is measure else plans[-1]
        found.append(Launch(kernel, grid, arguments, options | backend.COMPILED, plan))

    def choose(size, device):
        plans.append(planned(size, device))
        return plans[-1]

    with (
        mock.patch.object(backend, "_run", run),
        mock.patch.object(backend, "choose", choose),
        mock.patch.object(backend, "_device", return_value=device),
        mock.patch.object(backend, "rounds_to_tf32", return_value=tf32),
    ):
        yield found


def launches(
    device: Device,
    T: int,
    B: int,
    H: int,
    dtype: torch.dtype,
    tf32: bool = False,
    options: Collection[str] = (),
    nonlinearity: str = "tanh",
) -> list[Launch]:
    """The launches of forward and of backward, with these of ALL options."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {
        "h_0": meta(1, B, H),
        "norm": meta(H, dtype=torch.float32),
        "beta": meta(H, dtype=torch.float32),
        "lengths": meta(B, dtype=torch.int64),
        "reset": meta(T, B, dtype=torch.bool),
        "window": 7,
        "clipping": 1.0,
        "record": meta(1, T, 1, len(FIELDS), dtype=torch.float64),
    }
    given = {name: given[name] if name in options else None for name in ALL}
    how = Options(
        f"rnn_{nonlinearity}",
        bptt_window=given["window"],
        clip_state_grad=given["clipping"],
    )
    w_hh = meta(H, H)
    weights = Weights(None, None, None, w_hh, given["norm"], given["beta"])
    states, rows = States(given["h_0"]), Rows(given["lengths"], given["reset"])
    with recorded(device, tf32) as found:
        y, last, saved, _ = backend.forward(meta(T, B, H), weights, states, rows, how)
        kept = Kept(None, y, weights, states, rows, saved)
        backend.backward(OutputGradients(y, last), kept, given["record"], Wanted(), how)
    return found


def source(launch: Launch) -> ASTSource:
    """As Triton would specialize it: pointers at 16 bytes, integers and floats by type alone."""
    constants, attributes = {}, {}

    def kind(value: object, *path: int) -> str | tuple:
        if value is None or launch.kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(kind(field, *path, i) for i, field in enumerate(value)))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        assert len(path) == 1, "Triton compiles a kernel for each number in a group"
        if isinstance(value, float):
            return "fp32"
        return "i64" if value >= 1 << 31 else "i32"

    names = launch.kernel.arg_names
    signature = {name: kind(launch.arguments[name], i) for i, name in enumerate(names)}
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> tuple[Figures, str]:
    """Figures of the compiled kernel, and its machine code."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(file.name, flag) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    figures = Figures(
        registers,
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        compiled.metadata.shared,
        len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)", code)),
        len(re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\b", code)),
    )
    return figures, code


@functools.cache
def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _cuobjdump(path: str, flag: str) -> str:
    return subprocess.run([_tool(), flag, path], capture_output=True, text=True, check=True).stdout


ALL = ("h_0", "norm", "beta", "lengths", "reset", "window", "clipping", "record")
ALONE = {name: (name,) for name in ALL if name != "beta"} | {"norm and beta": ("norm", "beta")}
# Heads of every padded size that one program has, and of every tile; rows few and many.
UNITS = {
    "float16": (16, 32, 64, 128, 256, 384, 600, 4096, 9000),
    "tf32": (16, 32, 64, 128, 200, 384, 4096, 9000),
    "tf32x3": (16, 32, 64, 128, 384, 4096, 9000),
}
# Sizes of every kernel whose rows do not begin at 16 bytes.
UNALIGNED = {
    "float16": (31, 63, 127, 255, 383, 599),
    "tf32": (31, 63, 127, 199, 383),
    "tf32x3": (31, 63, 127, 383),
}
# Where each option is compiled by itself, too: resident, streamed and kept.
WITH_EACH = {"float16": (256, 384, 600), "tf32": (128, 200), "tf32x3": (128, 384)}
ROWS = (8, 2000)
KINDS = {  # dtype, and whether TF32 is on
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "tf32x3": (torch.float32, False),
}


def _models() -> Iterator[tuple[str, int, str, str, Collection[str]]]:
    """Precision, units, nonlinearity, and options by name."""
    some = {"plain": (), "all options": ALL}
    for kind in UNITS:
        for f, units in itertools.product(("tanh", "relu", "sigmoid"), UNITS[kind]):
            yield from ((kind, units, f, *what) for what in some.items())
    for kind, sizes in UNALIGNED.items():
        yield from ((kind, units, "tanh", *what) for units in sizes for what in some.items())
    for units in (256, 384):
        yield from (("bfloat16", units, "tanh", *what) for what in some.items())
    for kind, sizes in WITH_EACH.items():
        yield from ((kind, units, "tanh", *what) for units in sizes for what in ALONE.items())


@functools.cache
def variants(capability: int) -> dict[str, Launch]:
    """Every kernel that a size or an option leads to on this device, by name."""
    found: dict[str, Launch] = {}
    hashes = set()
    for (kind, units, f, what, options), B in itertools.product(_models(), ROWS):
        dtype, tf32 = KINDS[kind]
        for launch in launches(DEVICES[capability], 100, B, units, dtype, tf32, options, f):
            key = source(launch).hash()
            if key in hashes:
                continue
            hashes.add(key)
            form = launch.arguments["FORM"]
            block = f"{form.BS}x{form.BB}"
            found[f"sm_{capability} {launch.name} {kind} {f} {units} units {block} {what}"] = launch
    return found
