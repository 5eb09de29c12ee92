"""Results of more than 2^31 elements: the last program of a launch over half a billion rows, in
memory that nobody touches but where that program does, against one of a few rows."""

from __future__ import annotations

import math
import mmap
from unittest import mock

import pytest
import torch
from rnnfast.triton_kernels import plan
from triton.runtime import interpreter

from rnnfast.backends import triton as backend
from rnnfast.cells.rnn import Options
from rnnfast.record import FIELDS

T, S, HEADS, D, BLOCK = 5, 32, 2, 2, 16
FEW = BLOCK - 1  # rows of the last program
MANY = 2**29 - 1
RESULTS = {
    *("p_y", "p_h_n", "p_ahat", "p_rstd"),
    *("p_dp", "p_dh_0", "p_dgamma", "p_dbeta", "p_carry", "p_record"),
}
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name since Python 3.11


def launches(B: int) -> list[tuple]:
    """Kernel, grid and arguments of forward, backward and the record, with all options."""

    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = []
    options = Options("tanh", HEADS, bptt_window=3, clip_state_grad=1.0, per_sample=True)
    gamma = meta(D * HEADS * S, dtype=torch.float32)
    sequences = (meta(B, dtype=torch.int64), meta(T, B, dtype=torch.bool))
    h_0, w_hh = meta(D, B, HEADS * S), meta(D, HEADS * S, S)
    buffer = meta(D, T, B, len(FIELDS), dtype=torch.float64)
    with mock.patch.object(backend, "_run", lambda *launch, **_: found.append(launch)):
        p = meta(T, B, D * HEADS * S)
        given = (gamma, gamma, h_0, *sequences, options)
        y, h_n, *saved = backend.forward(p, None, None, None, w_hh, *given)
        saved = (y, None, None, w_hh, gamma, gamma, *saved, h_0, *sequences, buffer)
        backend.backward(y, h_n, *saved, True, True, options)
    return found


def values(like: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.uint8:
        return torch.randint(0, 5, like.shape).eq(0).to(torch.uint8)
    if like.dtype == torch.int64:  # lengths, or counters
        return (
            torch.arange(FEW) % (T + 1) if like.shape[0] == FEW else torch.zeros(like.shape).long()
        )
    return torch.rand(like.shape).to(like.dtype)


def virtual(like: torch.Tensor) -> torch.Tensor:
    """Zeros, which are there once they are touched."""
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, size * like.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def last(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows, or parts of a sum, of the last program."""
    for axis, (many, few) in enumerate(zip(x.shape, like.shape, strict=True)):
        if many != few:
            return x.narrow(axis, many - few, few)
    return x


@pytest.fixture
def last_program(monkeypatch):
    """Runs that of a launch alone, and no access outside of its tensors."""
    builder, inside = interpreter.interpreter_builder, []

    def run(kernel, grid: tuple[int, ...], arguments: dict) -> None:
        programs = list(grid)
        if "slices" in arguments and "p_counter" in arguments:  # this team's next set is the last
            sets = arguments["G"] * arguments["slices"]
            programs[1] = max(sets - grid[1], grid[1])
        tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
        inside[:] = [(v.data_ptr(), v.data_ptr() + v.untyped_storage().nbytes()) for v in tensors]
        index = tuple(n - 1 for n in grid) + (0,) * (3 - len(grid))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", index))
        dims = (*programs, *(1,) * (3 - len(grid)))
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", dims))
        with backend._on(torch.device("cpu")):
            kernel[(1,)](**arguments)

    def checked(name: str, where: int) -> None:
        original = getattr(builder, name)

        def access(pointers, *rest):
            addresses = pointers.data[rest[where].data.astype(bool)]
            ours = [(start <= addresses) & (addresses < end) for start, end in inside]
            assert sum(ours).all(), "an address outside of all tensors"
            return original(pointers, *rest)

        monkeypatch.setattr(builder, name, access)

    checked("create_masked_load", 0)
    checked("create_masked_store", 1)
    return run


@pytest.mark.parametrize("kernel", ["resident", "tiled", "kept"])
def test_results_beyond_32_bits(kernel, last_program, monkeypatch):
    monkeypatch.setattr(plan, "RESIDENT_ROWS", (BLOCK, BLOCK))
    monkeypatch.setattr(plan, "TILES", ((S, BLOCK, 4),) * 2)
    monkeypatch.setattr(plan, "KEPT_TILE", (S, BLOCK, 4))
    if kernel != "resident":
        monkeypatch.setattr(plan, "RESIDENT_UNITS", {2: 0})
        monkeypatch.setattr(plan, "KEPT_UNITS", {8: {"half": S if kernel == "kept" else 0}})
    teams = plan.Device("a team for each group", (8, 0), D * HEADS, 1 << 20)
    monkeypatch.setattr(backend, "_device", lambda *_: teams)
    torch.manual_seed(0)
    changed = set()
    for (code, grid, few), (_, many_grid, many) in zip(launches(FEW), launches(MANY), strict=True):
        beyond = set()
        for name, like in few.items():
            if isinstance(like, torch.Tensor):
                few[name], huge = values(like), virtual(many[name])
                last(huge, like).copy_(few[name])
                beyond |= {name} if math.prod(huge.shape) > 2**31 else set()
                many[name] = huge
        before = {name: few[name].clone() for name in beyond}
        last_program(code, grid, few)
        last_program(code, many_grid, many)
        for name in beyond:
            assert torch.equal(last(many[name], few[name]), few[name]), name
        changed |= {name for name in beyond if not torch.equal(few[name], before[name])}
    assert changed == RESULTS
