"""The machine code of the CUDA kernels, read from the objects of the extension."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import triton

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
import setup as package  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BARRIER = 20  # cycles until all warps go on
FLIGHT = 230  # until what was sent to another block is there, and its mbarrier has let a warp go on
# Cycles until the result of what has no fixed latency is there: assumed, but for published ones.
LATENCY = {"LDS": 30, "STS": 12, "MUFU": 22, "MOVM": 30, "SHFL": 24, "LDG": 16, "STG": 16}
LATENCY |= {"STAS": 12, "SYNCS": 8}
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
    def conditional(self) -> bool:
        return self.text.startswith("@") or re.search(r"\bBRA\.U\S* !?UP", self.text) is not None

    @property
    def waits_for_others(self) -> bool:
        return self.name.startswith("SYNCS.PHASECHK")

    @property
    def offset(self) -> int:
        """The constant part of an address in shared memory."""
        found = re.search(r"\+0x([0-9a-f]+)\]", self.text)
        return int(found[1], 16) if found else 0

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


class Figures(NamedTuple):
    """Figures of one kernel; "loop" is its time loop."""

    registers: int
    warps: int
    stack: int  # bytes
    spills: int  # instructions on local memory
    products: int  # HMMA in the loop
    barriers: int  # in the loop, mbarriers too
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
    """The object's cubin, or one compiled from its PTX as a driver does."""
    cubin = folder / f"{object_file.stem}.{arch}.cubin"
    if cubin.exists():
        return cubin
    listed = run("cuobjdump", "-lelf", object_file)
    if f".{arch}.cubin" in listed:
        run("cuobjdump", "-xelf", f".{arch}.cubin", object_file, cwd=folder)
        (made,) = folder.glob(f"{object_file.stem}.*.{arch}.cubin")
        made.rename(cubin)
    else:
        run("cuobjdump", "-xptx", "all", object_file, cwd=folder)
        (ptx,) = folder.glob(f"{object_file.stem}.*.ptx")
        command = [*nvcc().command, "-O3", f"-arch={arch}", "-cubin", ptx, "-o", cubin]
        subprocess.run(command, check=True)
        ptx.unlink()
    return cubin


def nvcc() -> package.Nvcc:
    return package.Nvcc.find(package.Compiler.find())


def run(tool: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


class Kernel(NamedTuple):
    """The arguments of a kernel's template."""

    which: str  # forward or backward
    units: int
    tiles: int
    blocks: int
    parts: int
    shared_products: int
    words: int  # of the weights of a product, in a thread
    options: list[str]

    @classmethod
    def of(cls, name: str) -> Kernel:
        which = re.search(r"(forward|backward)_kernel", name)[1]
        numbers = re.search(r"E" + r"Li(\d+)E" * 5 + "E", name).groups()
        flags = re.findall(r"Lb([01])", name)
        words = [w for w, flag in zip(("norm", "clip"), flags) if flag == "1"]
        return cls(which, *map(int, numbers), 12 if "Exact" in name else 4, words)

    def __str__(self) -> str:
        return " ".join([self.which, f"{self.units} units", f"{self.blocks} blocks", *self.options])

    @property
    def scarce(self) -> bool:  # kScarce
        return self.shared_products * self.words > 16 * self.tiles

    @property
    def bands(self) -> int:
        return self.units // (16 * self.tiles * self.blocks)

    @property
    def warps(self) -> int:
        return self.bands * self.parts

    @property
    def owners(self) -> int:
        return self.bands * self.tiles // -(-self.tiles // self.parts)


class Streamed(NamedTuple):
    """A kernel whose time steps are launches; those that multiply have tiles and slices of a block,
    too."""

    which: str  # forward, backward, pack, begin, finish_forward, finish_backward
    tiles: int = 0
    slices: int = 0
    transposed: bool = False
    warps: int = 8

    @classmethod
    def of(cls, name: str) -> Streamed:
        which = re.search(r"streaming\d+([a-z_]+)_kernel", name)[1]
        block = re.search(r"E" + r"Li(\d+)E" * 2 + "E", name)
        sizes = map(int, block.groups()) if block else (0, 0)
        return cls(which, *sizes, transposed="Lb1E" in name)

    def __str__(self) -> str:
        of_block = [f"{16 * self.tiles}x{8 * self.slices}"] if self.tiles else []
        return " ".join(["streaming", self.which, *of_block, *["transposed"] * self.transposed])


# ------------------------------------------------------------------------------------ the time loop


def successors(code: list[Instruction]) -> list[list[int]]:
    """By index. A call comes back; where threads meet again they go on behind it."""
    at = {i.address: n for n, i in enumerate(code)}
    found = []
    for n, i in enumerate(code):
        ways = [] if i.kind in ("EXIT", "RET") or i.target is not None else [n + 1]
        if i.conditional:
            ways = [n + 1]
        if i.target is not None and i.target in at:
            ways.append(at[i.target])
        found.append([w for w in ways if w < len(code)])
    return found


def walk(after: Callable[[int], list[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """From 0 on: every node behind all that it leads to, and the edges that lead back to where the
    walk was still on its way."""
    order, back, seen, on_way = [], [], {0}, {0}
    stack = [(0, iter(after(0)))]
    while stack:
        node, ways = stack[-1]
        way = next(ways, None)
        if way is None:
            stack.pop()
            on_way.discard(node)
            order.append(node)
        elif way in on_way:
            back.append((node, way))
        elif way not in seen:
            seen.add(way)
            on_way.add(way)
            stack.append((way, iter(after(way))))
    return order, back


def time_loop(code: list[Instruction], kind: str = "HMMA") -> list[Instruction]:
    """The longest loop that has such an instruction in it, its first instruction first."""
    after = successors(code)
    before: list[list[int]] = [[] for _ in code]
    for n, ways in enumerate(after):
        for way in ways:
            before[way].append(n)
    loops: dict[int, set[int]] = {}
    for last, first in walk(after.__getitem__)[1]:
        loop = loops.setdefault(first, {first})
        todo = [last]
        while todo:
            n = todo.pop()
            if n not in loop:
                loop.add(n)
                todo += before[n]
    found = [
        (len(loop), first, loop)
        for first, loop in loops.items()
        if any(code[n].kind == kind for n in loop)
    ]
    assert found, f"no loop with {kind} in it"
    _, first, loop = max(found)
    return [code[first], *(code[n] for n in sorted(loop - {first}))]


def usual_path(loop: list[Instruction], together: bool = False) -> list[Instruction]:
    """The instructions of a step: at each branch the shorter way that leaves out no product, no
    wait, nothing of f, no full-width access to memory. together: layer norm's sums are exchanged
    with those of clipping, and apart only where a gradient is too large for that."""
    index = {i.address: n for n, i in enumerate(loop)}
    in_order = sorted(loop, key=lambda i: i.address)
    behind = {i.address: j.address for i, j in itertools.pairwise(in_order)}
    again = set()  # where a wait that was in vain is tried once more
    for n, i in enumerate(in_order):
        if i.waits_for_others:
            branch = next(j for j in in_order[n:] if j.target is not None)
            if branch.target <= i.address:
                again.add(i.address)
    # The mbarriers, as they lie: of the state, of layer norm's sums, of those of clipping.
    offsets = sorted({i.offset for i in loop if i.waits_for_others and i.address not in again})
    apart = offsets[1] if together and len(offsets) == 3 else None

    def worth(i: Instruction) -> float:
        narrow = re.search(r"\.(U8|S8|U16|S16)\b", i.name)
        if i.address in again or i.kind == "I2F":  # or a division of integers
            return -5000
        if i.name == "MUFU.TANH":  # for eight of what another f takes
            return 3000
        if i.kind == "FMUL" and "2.81474976710656" in i.text:  # kUp of norms.cuh: not once more
            return 100
        if i.waits_for_others:
            return 1000 if i.offset != apart else -5000
        if i.kind in ("HMMA", "MUFU"):
            return 1000
        if i.kind == "STAS":
            return 100
        return 7 if i.kind in ("LDG", "STG") and not narrow else -1

    def ways(n: int) -> list[int]:
        i = loop[n]
        goes_on = i.target is None or i.conditional
        if i.name == "BRA.DIV":  # what lanes do that have parted, one by one
            return [index[behind[i.address]]]
        found = [behind.get(i.address) if goes_on else None, i.target]
        return [index[w] for w in found if w in index]

    value: dict[int, float] = {}  # of the way from here to the next turn
    follow: dict[int, int] = {}
    order, _ = walk(ways)
    for n in order:
        known = {way: 0.0 if way == 0 else value.get(way, -math.inf) for way in ways(n)}
        follow[n] = max(known, key=known.__getitem__, default=0)
        value[n] = worth(loop[n]) + known.get(follow[n], -math.inf)
    path, n = [loop[0]], follow[0]
    while n != 0:
        path.append(loop[n])
        n = follow[n]
    return path


def shared_part(path: list[Instruction]) -> list[Instruction]:
    """The path of warps without tiles: from the wait for the state until they write their sums."""
    products = [n for n, i in enumerate(path) if i.kind == "HMMA"]
    first = max(n for n, i in enumerate(path[: products[0]]) if i.waits_for_others)
    last = next(n for n, i in enumerate(path) if n > products[-1] and i.kind == "BAR")
    return path[first : last + 1]


def sent_for(path: list[Instruction]) -> dict[int, int | None]:
    """Where what a wait waits for is sent in the same turn: the address of the last store. Waits
    are in the order of what they wait for; before sums are sent they are added up, by shuffles."""
    found: dict[int, int | None] = {}
    groups: list[int] = []
    goes_on = False
    for i in path:
        if i.kind == "STAS":
            groups = [*(groups[:-1] if goes_on else groups), i.address]
            goes_on = True
        elif i.waits_for_others:
            found[i.address] = groups.pop(0) if groups else None
            goes_on = False
        elif i.kind == "SHFL":
            goes_on = False
    return found


def cycles(
    path: list[Instruction], warps: int, owners: int, log: Callable = lambda *_: None
) -> int:
    """Cycles of one turn, by a model of four schedulers that issue in order, one instruction a
    cycle. It calls log(cycle, warp, instruction) for each."""
    paths = [path] * owners
    if owners < warps:
        paths += [shared_part(path)] * (warps - owners)
    at, ready = [0] * warps, [0.0] * warps
    boards = [[0.0] * 6 for _ in range(warps)]
    tensor, memory, now = [0.0] * 4, 0.0, 0
    waiting: dict[int, set[int]] = {}
    opened: dict[int, float] = {}
    sends = sent_for(path)

    def passes(w: int, i: Instruction) -> bool:
        """All warps come to a barrier; an mbarrier waits for what the owners have sent."""
        others = i.waits_for_others
        if i.address not in opened:
            here = i.address if sends.get(i.address) is None else sends[i.address]
            there = waiting.setdefault(here, set())
            if here == i.address:
                there.add(w)
            if len([v for v in there if v < owners or not others]) < (owners if others else warps):
                return False
            opened[i.address] = sent.get(here, now) + FLIGHT if others else now + BARRIER
        return opened[i.address] <= now

    sent: dict[int, int] = {}  # when the last warp has sent, by the address of the last store

    while any(n < len(p) for n, p in zip(at, paths)):
        for scheduler in range(min(4, warps)):
            mine = range(scheduler, warps, 4)
            for turn in range(len(mine)):
                w = mine[(turn + now) % len(mine)]
                if at[w] >= len(paths[w]) or ready[w] > now:
                    continue
                i = paths[w][at[w]]
                if any(i.waits >> b & 1 and boards[w][b] > now for b in range(6)):
                    continue
                if i.kind == "HMMA" and tensor[scheduler] > now:
                    continue
                if (i.kind == "BAR" or i.waits_for_others) and not passes(w, i):
                    continue
                if i.kind == "HMMA":
                    tensor[scheduler] = max(tensor[scheduler], now) + HMMA
                done = now + LATENCY.get(i.kind, OTHERS)
                if i.kind in ("LDS", "STS", "LDG", "STG", "STAS"):  # 128 bytes a cycle
                    width = 4 if ".128" in i.name else 2 if ".64" in i.name else 1
                    memory = max(memory, now) + width
                    done = memory + LATENCY[i.kind]
                if i.writes < 6:
                    boards[w][i.writes] = max(boards[w][i.writes], done)
                if i.reads < 6:
                    boards[w][i.reads] = max(boards[w][i.reads], now + OTHERS)
                if i.kind == "STAS":
                    waiting.setdefault(i.address, set()).add(w)
                    sent[i.address] = now
                log(now, w, i)
                at[w] += 1
                ready[w] = now + max(1, i.stall)
                break
        now += 1
    return now


def figures(code: list[Instruction], registers: int, stack: int, kernel: Kernel) -> Figures:
    loop = time_loop(code)
    path = usual_path(loop, kernel.options == ["norm", "clip"] and not kernel.scarce)
    return Figures(
        registers,
        kernel.warps,
        stack,
        sum(i.kind in ("LDL", "STL") for i in code),
        sum(i.kind == "HMMA" for i in loop),
        sum(i.kind == "BAR" or i.waits_for_others for i in path),
        sum(i.kind in ("MEMBAR", "ERRBAR", "CCTL") for i in loop),
        loaded(loop),
        len(path),
        cycles(path, kernel.warps, kernel.owners),
    )


def streamed(code: list[Instruction], registers: int, stack: int, kernel: Streamed) -> Figures:
    """Its loop is the product's; what it takes is what L2 gives, and not estimated here."""
    loop = time_loop(code) if kernel.tiles else []
    spills = sum(i.kind in ("LDL", "STL") for i in code)
    kinds = [i.kind for i in loop]
    waits = sum(kinds.count(kind) for kind in ("BAR", "SYNCS"))
    fences = sum(kinds.count(kind) for kind in ("MEMBAR", "ERRBAR", "CCTL"))
    return Figures(
        *(registers, kernel.warps, stack, spills, kinds.count("HMMA"), waits, fences),
        *(loaded(loop), len(loop), 0),
    )


def loaded(code: list[Instruction]) -> int:
    """Bytes that a thread reads from global memory."""
    width = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = [re.search(r"\.(128|64|U16|S16|U8|S8)\b", i.name) for i in code if i.kind == "LDG"]
    return sum(width[w[1]] if w else 4 for w in found)


def table(
    objects: Path, arch: str, folder: Path, modes: Iterable[str] = package.CUDA_MODES
) -> dict[str, Figures]:
    """{mode and kernel: figures} of the extension whose objects are in a folder."""
    found = {}
    for name, _, mode, family in package.cuda_objects():
        if mode not in modes or (family == "cluster" and arch == "sm_80"):
            continue
        inside = folder / name
        inside.mkdir(exist_ok=True)
        file = objects.resolve() / f"{name}.o"
        used = usage(file, arch, inside)
        for symbol, code in sorted(kernels(file, arch, inside).items()):
            kind, of_kind = (Streamed, streamed) if family == "streaming" else (Kernel, figures)
            kernel = kind.of(symbol)
            found[f"{arch} {mode} {kernel}"] = of_kind(code, *used[symbol], kernel)
    return found
