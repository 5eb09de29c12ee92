"""What nvcc has made of the CUDA kernels, read from the objects of the extension."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import setup as package  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BARRIER = 20  # cycles until all warps go on
# Cycles until the result of what has no fixed latency is there: assumed, but for published ones.
LATENCY = {"LDS": 30, "STS": 12, "MUFU": 22, "MOVM": 30, "SHFL": 24, "LDG": 16, "STG": 16}
HMMA = 6.26  # cycles that one occupies a tensor core
OTHERS = 8


class Instruction(NamedTuple):
    address: int
    text: str
    stall: int  # cycles until the next one of the warp may follow
    writes: int  # scoreboard that is free once the result is there; 7 for none
    reads: int  # once the operands are read
    waits: int  # mask of scoreboards to wait for

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


class Figures(NamedTuple):
    """Of one kernel; "loop" is its time loop."""

    registers: int
    stack: int  # bytes
    spills: int  # instructions on local memory
    products: int  # HMMA in the loop
    barriers: int  # in the loop
    fences: int  # MEMBAR, ERRBAR, CCTL in the loop
    loads: int  # bytes that a thread reads from global memory in a step, at most
    instructions: int  # of a step without lengths, resets and rows at odd addresses
    cycles: int  # of it, estimated


def kernels(object_file: Path, arch: str, folder: Path) -> dict[str, list[Instruction]]:
    """{name: code} of an object for "sm_80" or "sm_90", or for another from its PTX."""
    cubin = cubin_of(object_file, arch, folder)
    return disassembled(cubin)


def disassembled(cubin: Path) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    text = run("cuobjdump", "-sass", cubin)
    pattern = (
        r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/"
    )
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, code = part.partition("\n")
        found[name.strip()] = instructions = []
        for address, words, control in re.findall(pattern, code):
            bits = int(control, 16) >> 41
            instructions.append(
                Instruction(
                    *(int(address, 16), words.strip(), bits & 15),
                    *(bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63),
                )
            )
    return found


def usage(object_file: Path, arch: str, folder: Path) -> dict[str, tuple[int, int]]:
    """{name: registers and bytes of stack}."""
    text = run("cuobjdump", "-res-usage", cubin_of(object_file, arch, folder))
    found = re.findall(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def cubin_of(object_file: Path, arch: str, folder: Path) -> Path:
    """Of the object, or compiled from its PTX as a driver does."""
    cubin = folder / f"{object_file.stem}.{arch}.cubin"
    if cubin.exists():
        return cubin
    listed = run("cuobjdump", "-lelf", object_file)
    if f".{arch}.cubin" in listed:
        run("cuobjdump", "-xelf", f".{arch}.cubin", object_file, cwd=folder)
        (made,) = folder.glob(f"*single_block*.{arch}.cubin")
        made.rename(cubin)
    else:
        run("cuobjdump", "-xptx", "all", object_file, cwd=folder)
        (ptx,) = folder.glob("*single_block*.ptx")
        command = [*nvcc().command, "-O3", f"-arch={arch}", "-cubin", ptx, "-o", cubin]
        subprocess.run(command, check=True)
        ptx.unlink()
    return cubin


def nvcc() -> package.Nvcc:
    return package.Nvcc.find(package.Compiler.find())


def run(tool: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def readable(name: str) -> str:
    """forward or backward, units, layer norm and, of backward, clipping."""
    which = re.search(r"(forward|backward)_in_block", name)[1]
    units, tiles = re.search(r"ELi(\d+)ELi(\d+)E", name).groups()
    flags = re.findall(r"Lb([01])E", name)
    words = [w for w, flag in zip(("norm", "clip"), flags) if flag == "1"]
    return " ".join([which, f"{units} units", f"{tiles} tiles", *words])


# ------------------------------------------------------------------------------------ the time loop


def time_loop(code: list[Instruction], kind: str = "HMMA") -> list[Instruction]:
    """The longest loop that has such an instruction in it."""
    loops = [
        [i for i in code if end.target <= i.address <= end.address]
        for end in code
        if end.target is not None and end.target < end.address
    ]
    loops = [loop for loop in loops if any(i.kind == kind for i in loop)]
    assert loops, f"no loop with {kind} in it"
    return max(loops, key=len)


def usual_path(loop: list[Instruction]) -> list[Instruction]:
    """The instructions of a step: at each branch the shorter way that leaves out no product, no
    barrier, nothing of f, no full-width access to memory."""

    def worth(i: Instruction) -> float:
        narrow = re.search(r"\.(U8|S8|U16|S16)\b", i.name)
        if i.kind in ("HMMA", "BAR", "MUFU"):
            return 1000
        return 7 if i.kind in ("LDG", "STG") and not narrow else -1

    at = {i.address: n for n, i in enumerate(loop)}
    value, follow = [float("-inf")] * (len(loop) + 1), [0] * len(loop)
    value[len(loop)] = 0
    for n in reversed(range(len(loop))):
        i, ways = loop[n], [n + 1]
        if i.target is not None and i.target > i.address:
            taken = at.get(i.target, len(loop))
            ways = [taken] if not i.text.startswith("@") else [n + 1, taken]
        follow[n] = max(ways, key=lambda w: value[w])
        value[n] = value[follow[n]] + worth(i)
    path, n = [], 0
    while n < len(loop):
        path.append(loop[n])
        n = follow[n]
    return path


def cycles(path: list[Instruction], warps: int) -> int:
    """Of one turn, by a model of four schedulers that issue in order, one instruction a cycle."""
    at, ready = [0] * warps, [0.0] * warps
    boards = [[0.0] * 6 for _ in range(warps)]
    tensor, memory, now = [0.0] * 4, 0.0, 0
    waiting: dict[int, int] = {}
    opened: dict[int, float] = {}
    while any(n < len(path) for n in at):
        for scheduler in range(min(4, warps)):
            mine = range(scheduler, warps, 4)
            for turn in range(len(mine)):
                w = mine[(turn + now) % len(mine)]
                if at[w] >= len(path) or ready[w] > now:
                    continue
                i = path[at[w]]
                if any(i.waits >> b & 1 and boards[w][b] > now for b in range(6)):
                    continue
                if i.kind == "HMMA":
                    if tensor[scheduler] > now:
                        continue
                    tensor[scheduler] = max(tensor[scheduler], now) + HMMA
                if i.kind == "BAR":
                    key = at[w]
                    if key not in opened:
                        waiting[key] = waiting.get(key, 0) | 1 << w
                        if waiting[key] == (1 << warps) - 1:
                            opened[key] = now + BARRIER
                        continue
                    if opened[key] > now:
                        continue
                done = now + LATENCY.get(i.kind, OTHERS)
                if i.kind in ("LDS", "STS", "LDG", "STG"):  # 128 bytes a cycle
                    width = 4 if ".128" in i.name else 2 if ".64" in i.name else 1
                    memory = max(memory, now) + width
                    done = memory + LATENCY[i.kind]
                if i.writes < 6:
                    boards[w][i.writes] = max(boards[w][i.writes], done)
                if i.reads < 6:
                    boards[w][i.reads] = max(boards[w][i.reads], now + OTHERS)
                at[w] += 1
                ready[w] = now + max(1, i.stall)
                break
        now += 1
    return now


def figures(code: list[Instruction], registers: int, stack: int, warps: int) -> Figures:
    loop = time_loop(code)
    path = usual_path(loop)
    width = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    loads = 0
    for i in loop:
        if i.kind == "LDG":
            found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", i.name)
            loads += width[found[1]] if found else 4
    return Figures(
        registers,
        stack,
        sum(i.kind in ("LDL", "STL") for i in code),
        sum(i.kind == "HMMA" for i in loop),
        sum(i.kind == "BAR" for i in path),
        sum(i.kind in ("MEMBAR", "ERRBAR", "CCTL") for i in loop),
        loads,
        len(path),
        cycles(path, warps),
    )


def table(objects: Path, arch: str, folder: Path) -> dict[str, Figures]:
    """{mode and kernel: figures} of the extension whose objects are in a folder."""
    found = {}
    for mode in package.CUDA_MODES:
        of_mode = folder / mode
        of_mode.mkdir(exist_ok=True)
        file = objects.resolve() / f"single_block.{mode}.o"
        used = usage(file, arch, of_mode)
        for name, code in sorted(kernels(file, arch, of_mode).items()):
            if "in_block" not in name:
                continue  # the record's, which has no product
            words = readable(name)
            units, tiles = map(int, re.findall(r"\d+", words)[:2])
            warps = units // (16 * tiles)
            found[f"{arch} {mode} {words}"] = figures(code, *used[name], warps)
    return found
