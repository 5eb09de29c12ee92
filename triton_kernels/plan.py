"""Which kernel runs a size on a device, and how it is cut up: pure functions, no GPU needed.

Times are estimates from published latencies, not measurements: no kernel has run on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# One program has all weights of a group up to this many padded units, by the bytes of a weight.
RESIDENT_UNITS = {2: 256, 4: 128}
# Rows of the batch that a program has: the smaller number while every program gets a
# multiprocessor. There are two, so that a new batch size compiles at most one more kernel.
RESIDENT_ROWS = (8, 16)
# Units, rows and warps of a program of a team, for few rows and for many. Few rows get many
# programs, so that each reads few weights a step. _team doubles the units where there are too few
# multiprocessors.
TILES = ((16, 16, 4), (64, 32, 8))
LARGEST_TILE = 1024
# The tile for few rows where the weights of a program fit into its registers. They fit up to this
# many padded units of a group, by compute capability (8; 9 and later) and precision.
KEPT_TILE = (64, 8, 8)
KEPT_UNITS = {
    8: {"half": 512, "tf32": 0, "tf32x3": 0},
    9: {"half": 512, "tf32": 256, "tf32x3": 0},
}
# For estimates: cycles in a microsecond; bytes in a cycle of one multiprocessor, twice; cycles.
CLOCK = 1700
SHARED_MEMORY_RATE = 128
L2_RATE = 35
BARRIER = 2000


class Device(NamedTuple):
    """Facts of a GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes a block may ask for


class Size(NamedTuple):
    """What a plan depends on. T is not in it."""

    units: int  # of a group: H / heads
    groups: int  # directions times heads
    rows: int  # of the batch
    precision: str  # "half", "tf32", "tf32x3"
    norm: bool = False

    @property
    def bytes(self) -> int:
        return 2 if self.precision == "half" else 4

    @property
    def products(self) -> int:
        """Tensor-core products for one product of the kernel."""
        return 3 if self.precision == "tf32x3" else 1


class Plan(NamedTuple):
    """How one call runs."""

    kernel: str  # "resident" or "tiled"
    block_units: int  # units of a program
    block_rows: int  # rows of the batch of a program
    block_products: int  # units of the state that enter a product at a time
    programs: int  # of a team; a team has all units of a group
    teams: int
    slices: int  # of the batch
    warps: int
    kept: bool  # whether weights stay in a program; if not, they come from the L2 cache each step
    shared: int  # bytes, an upper bound
    step: float  # microseconds of a time step of forward, estimated

    def __str__(self) -> str:
        if self.kernel == "resident":
            who = f"{self.teams} programs, each alone"
        else:
            who = f"{self.teams} teams of {self.programs} programs, a barrier a step"
        weights = "kept by the program" if self.kept else "from the L2 cache at each step"
        return (
            f"{self.kernel}: {self.block_units} units by {self.block_rows} rows a program, {who}, "
            f"{self.warps} warps, weights {weights}, at most {self.shared / 1024:.0f} KiB of "
            f"shared memory, {self.step:.2f} us a step of forward (estimated)"
        )


@functools.lru_cache(256)
def choose(size: Size, device: Device) -> Plan | str:
    """The plan, or why there is none."""
    plans = _resident(size, device) or _tiled(size, device)
    if plans is None:
        return (
            f"{size.units} units a head need more than the {device.multiprocessors} "
            f"multiprocessors and {device.shared_memory / 1024:.0f} KiB of shared memory a block "
            f"of {device.name}"
        )
    return min(plans, key=lambda plan: plan.step)


# _resident and _tiled return the plans for few rows and for many, or None where one of them does
# not fit: the batch size alone never changes which of the two kernels runs.


def _resident(size: Size, device: Device) -> list[Plan] | None:
    units = max(16, power_of_two(size.units))
    if units > RESIDENT_UNITS[size.bytes]:
        return None
    copies = 2 if size.precision == "tf32x3" else 1
    few, many = RESIDENT_ROWS
    if units >= (64 if size.precision == "tf32x3" else 256):
        many = few  # more would not fit into the registers
    plans = []
    for rows in (few, many):
        # The weights, the state of a step, and the sums over units that warps exchange.
        shared = units * units * size.bytes * copies + 16 * units * rows + 1024
        if shared > device.shared_memory:
            return None
        slices = blocks(size.rows, rows)
        turns = blocks(size.groups * slices, device.multiprocessors)
        cycles = 600 + units * units * size.bytes * size.products / SHARED_MEMORY_RATE
        cycles += units * rows / 64 + (300 if size.norm else 0)
        plans.append(
            Plan(
                kernel="resident",
                block_units=units,
                block_rows=rows,
                block_products=units,
                programs=1,
                teams=size.groups * slices,
                slices=slices,
                warps=4 if units <= 64 else 8,
                kept=True,
                shared=shared,
                step=turns * cycles / CLOCK,
            )
        )
    return plans


def _tiled(size: Size, device: Device) -> list[Plan] | None:
    plans = [_team(size, device, *tile) for tile in TILES]
    if power_of_two(size.units) <= KEPT_UNITS[min(device.capability[0], 9)][size.precision]:
        plans[0] = _team(size, device, *KEPT_TILE, kept=True) or plans[0]
    return None if None in plans else plans


def _team(
    size: Size, device: Device, tile: int, rows: int, warps: int, kept: bool = False
) -> Plan | None:
    while blocks(size.units, tile) > device.multiprocessors and tile < LARGEST_TILE and not kept:
        tile, warps = 2 * tile, 8
        if tile > 64:
            rows = TILES[0][1]  # more would not fit into the registers
    programs = blocks(size.units, tile)
    products = 128 // size.bytes
    if tile > 128 or (tile > 32 and size.precision == "tf32x3"):
        products = 16
    read = (tile * size.products + rows) * size.units * size.bytes
    # Three buffers for the operands of a product.
    shared = 3 * products * (tile + rows) * size.bytes
    if kept:
        products = max(16, power_of_two(size.units))
        read = rows * size.units * size.bytes
        shared = products * (tile + rows) * size.bytes  # the weights on their way
    shared += 4 * tile * rows + 4096
    if programs > device.multiprocessors or shared > device.shared_memory:
        return None
    slices = blocks(size.rows, rows)
    teams = max(1, min(device.multiprocessors // programs, size.groups * slices))
    turns = blocks(size.groups * slices, teams)
    cycles = 600 + BARRIER + read / L2_RATE + tile * rows / 64
    cycles += 500 + BARRIER if size.norm else 0
    return Plan(
        kernel="tiled",
        block_units=tile,
        block_rows=rows,
        block_products=products,
        programs=programs,
        teams=teams,
        slices=slices,
        warps=warps,
        kept=kept,
        shared=shared,
        step=turns * cycles / CLOCK,
    )


def blocks(number: int, of: int) -> int:
    return -(-number // of)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least number."""
    return 1 << max(0, number - 1).bit_length()
