"""Which kernel serves a size on a device, and how it is cut up: pure functions, no GPU needed.

Times are estimates from published latencies, not measurements: no kernel has run on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

# Padded units of a group up to which a program has all of its weights, by their bytes.
RESIDENT_UNITS = {2: 256, 4: 128}
# What a program has at a time where the weights come from the L2 cache.
STREAMED = 64
# Rows of the batch that a program has: the first where every program gets a multiprocessor. Two
# sizes, so that a new batch size compiles at most one more kernel.
RESIDENT_ROWS = (8, 16)
TILED_ROWS = (16, 64)
LARGEST_TILE = 1024  # units of a program


class Device(NamedTuple):
    """Facts of a GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes a block may ask for
    clock: float = 1.7  # GHz, for estimates


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


class Plan(NamedTuple):
    """How one call runs."""

    kernel: str  # "resident" or "tiled"
    block_units: int  # units of a program
    block_rows: int  # rows of the batch of a program
    block_products: int  # units of the state that enter a product at a time
    programs: int  # of a team, which has all units of a group
    teams: int
    slices: int  # of the batch
    held: bool  # weights stay in shared memory
    warps: int
    shared: int  # bytes, an upper bound
    step: float  # microseconds of a time step of forward, estimated

    def __str__(self) -> str:
        weights = "kept in shared memory" if self.held else "from the L2 cache at each step"
        cut = f"{self.block_units} units by {self.block_rows} rows a program"
        if self.kernel == "resident":
            who = f"{self.teams} programs, each alone"
        else:
            who = f"{self.teams} teams of {self.programs} programs, a barrier a step"
        return (
            f"{self.kernel}: {cut}, {who}, {self.warps} warps, weights {weights}, at most "
            f"{self.shared / 1024:.0f} KiB of shared memory, {self.step:.2f} us a step of forward "
            "(estimate)"
        )


def choose(size: Size, device: Device) -> Plan | str:
    """The plan, or why there is none."""
    found = _resident(size, device) or _tiled(size, device)
    if found is None:
        return (
            f"{size.units} units a head need more than the {device.multiprocessors} "
            f"multiprocessors and {device.shared_memory / 1024:.0f} KiB of shared memory a block "
            f"of {device.name}"
        )
    return found


def _resident(size: Size, device: Device) -> Plan | None:
    units = max(16, power_of_two(size.units))
    if units > RESIDENT_UNITS[size.bytes]:
        return None
    few, many = RESIDENT_ROWS
    rows = few if size.groups * blocks(size.rows, few) <= device.multiprocessors else many
    shared = _shared(size, units, rows, units, held=True)
    # Both row counts must fit: the batch size alone never changes which kernel serves.
    if _shared(size, units, many, units, held=True) > device.shared_memory:
        return None
    slices = blocks(size.rows, rows)
    teams = size.groups * slices
    at_once = blocks(teams, device.multiprocessors)
    step = at_once * _step(size, device, units, rows, units, held=True)
    warps = 4 if units <= 64 else 8
    return Plan("resident", units, rows, units, 1, teams, slices, True, warps, shared, step)


def _tiled(size: Size, device: Device) -> Plan | None:
    held_units = max(16, power_of_two(size.units))
    few, many = TILED_ROWS
    tile = STREAMED
    while blocks(size.units, tile) > device.multiprocessors:
        tile *= 2
    if tile > LARGEST_TILE:
        return None
    programs = blocks(size.units, tile)
    most_teams = device.multiprocessors // programs
    rows = few if size.groups * blocks(size.rows, few) <= most_teams else many
    held = _shared(size, tile, rows, held_units, held=True) <= device.shared_memory
    products = held_units if held else STREAMED
    shared = _shared(size, tile, rows, products, held)
    if shared > device.shared_memory:
        return None
    slices = blocks(size.rows, rows)
    teams = max(1, min(most_teams, size.groups * slices))
    turns = blocks(size.groups * slices, teams)
    step = turns * _step(size, device, tile, rows, products, held, alone=False)
    warps = 4 if tile <= 64 else 8
    return Plan("tiled", tile, rows, products, programs, teams, slices, held, warps, shared, step)


def _shared(size: Size, units: int, rows: int, products: int, held: bool) -> int:
    """Bytes of shared memory, no fewer than the compiler takes (tests/triton compares)."""
    copies = 2 if size.precision == "tf32x3" else 1
    weights = units * products * size.bytes * (copies if held else 3 * copies)
    state = products * rows * size.bytes * (copies if held else 3 * copies)
    return weights + state + 4 * units * rows + 4096


def _step(
    size: Size,
    device: Device,
    units: int,
    rows: int,
    products: int,
    held: bool,
    alone: bool = True,
) -> float:
    """Microseconds of a step of forward."""
    times = 3 if size.precision == "tf32x3" else 1
    weights = units * max(products, size.units) * size.bytes * times
    cycles = 600 + weights / (128 if held else 35)  # shared memory, L2: bytes a cycle
    cycles += units * rows / 64  # f, conversions
    if not alone:
        cycles += 2000 + size.units * rows * size.bytes / 35  # the barrier; the state from L2
    if size.norm:
        cycles += 300 if alone else 2500
    return cycles / device.clock / 1000


def torch_step(size: Size, device: Device) -> float:
    """Microseconds of a step of forward of torch's own kernels (cuDNN)."""
    tensor_cores = size.precision != "tf32x3"
    rate = {"half": 500, "tf32": 250, "tf32x3": 50}[size.precision]  # GFLOP a ms
    rate *= device.multiprocessors / 132
    work = 2 * size.rows * size.units**2 * size.groups / rate / 1e6
    fixed = 1.0 if size.units <= 256 and tensor_cores else 1.5
    return fixed + work


def blocks(number: int, of: int) -> int:
    return -(-number // of)


def power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << max(0, number - 1).bit_length()
