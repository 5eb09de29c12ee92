"""Results of more than 2^31 elements: the last programs of a launch over many rows, in memory that
is there only where they touch it, against a launch over a few rows."""

from __future__ import annotations

import mmap
from unittest import mock

import pytest
import torch
from rnnfast.triton_kernels import plan
from triton.runtime import interpreter

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

T, S, D, BLOCK = 5, 64, 2, 16
FEW = BLOCK - 1  # rows of the last programs
RESULTS = {
    *(f"results.{name}" for name in ("y", "h_n", "ahat", "rstd")),
    *(f"gradients.{name}" for name in ("dp", "dh_0", "dgamma", "dbeta", "carry")),
    "p_record",
}
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name since Python 3.11


def launches(B: int) -> list[tuple]:
    """Kernel, grid and arguments of forward, backward and the record, with all options."""

    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = []
    # With ReLU backward looks at y, whatever the dtype.
    options = Options("rnn_relu", D, bptt_window=3, clip_state_grad=1.0, per_sample=True)
    gamma = meta(D * S, dtype=torch.float32)
    weights = Weights(None, None, None, meta(D * S, S), gamma, gamma)
    states = States(meta(D, B, S))
    rows = Rows(meta(B, dtype=torch.int64), meta(T, B, dtype=torch.bool))
    buffer = meta(D, T, B, len(FIELDS), dtype=torch.float64)
    with mock.patch.object(backend, "_run", lambda *launch, **_: found.append(launch)):
        y, last, saved, _ = backend.forward(meta(T, B, D * S), weights, states, rows, options)
        kept = Kept(None, y, weights, states, rows, saved)
        backend.backward(OutputGradients(y, last), kept, buffer, Wanted(), options)
    return found


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    """The tensors among the arguments, those in groups as group.field."""
    found = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, tuple):
            found |= {f"{name}.{field}": v for field, v in value._asdict().items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def with_tensors(arguments: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """The arguments with these tensors, named as by tensors_of, in the place of theirs."""
    changed = dict(arguments)
    for name, value in tensors.items():
        group, _, field = name.partition(".")
        changed[group] = changed[group]._replace(**{field: value}) if field else value
    return changed


def values(like: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.uint8:
        return torch.randint(0, 5, like.shape).eq(0).to(torch.uint8)
    if like.dtype == torch.int64:  # lengths, or counters
        few = like.shape[0] == FEW
        return torch.arange(FEW) % (T + 1) if few else torch.zeros(like.shape, dtype=like.dtype)
    return torch.randn(like.shape).to(like.dtype)


def virtual(like: torch.Tensor) -> torch.Tensor:
    """Zeros, which are there once they are touched."""
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, size * like.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def last(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows, or parts of a sum, of the last programs."""
    for axis, (many, few) in enumerate(zip(x.shape, like.shape, strict=True)):
        if many != few:
            return x.narrow(axis, many - few, few)
    return x


@pytest.fixture
def last_programs(monkeypatch):
    """Runs those of a launch alone, and lets no access be outside of its tensors."""
    builder, inside = interpreter.interpreter_builder, []

    def run(kernel, grid: tuple[int, int], arguments: dict) -> None:
        programs, number = grid, T if "p_record" in arguments else 1
        if "exchange" in arguments:  # a team goes on with its last set
            programs = grid[0], max(D, D * arguments["slices"] - D)
        inside[:] = [
            (v.data_ptr(), v.data_ptr() + v.untyped_storage().nbytes())
            for v in tensors_of(arguments).values()
        ]

        def set_index(x: int, y: int, z: int) -> None:
            builder.grid_idx = grid[0] - number + x, y, z

        monkeypatch.setattr(builder, "set_grid_idx", set_index)
        monkeypatch.setattr(
            builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", (*programs, 1))
        )
        with backend._on(torch.device("cpu")):
            kernel[number, grid[1]](**arguments)

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


# The first: even the smallest results are beyond 32 bits. The second: strides alone are within.
@pytest.mark.parametrize("rows", [2**29 - 1, 2**26 - 1])
@pytest.mark.parametrize("kernel", ["resident", "tiled", "kept"])
def test_results_beyond_32_bits(kernel, rows, last_programs, monkeypatch):
    monkeypatch.setattr(plan, "RESIDENT_ROWS", (BLOCK, BLOCK))
    monkeypatch.setattr(plan, "TILES", ((S, BLOCK, 4),) * 2)
    monkeypatch.setattr(plan, "KEPT_TILE", (S, BLOCK, 4))
    if kernel != "resident":
        monkeypatch.setattr(plan, "RESIDENT_UNITS", {2: 0})
        monkeypatch.setattr(plan, "KEPT_UNITS", {8: {"half": S if kernel == "kept" else 0}})
    teams = plan.Device("a team for each direction", (8, 0), D, 1 << 20)
    monkeypatch.setattr(backend, "_device", lambda *_: teams)
    torch.manual_seed(0)
    changed = set()
    for (code, grid, few), (_, grid_of_many, many) in zip(
        launches(FEW), launches(rows), strict=True
    ):
        small, large = tensors_of(few), tensors_of(many)
        for name in small:
            small[name], large[name] = values(small[name]), virtual(large[name])
            last(large[name], small[name]).copy_(small[name])
            if name in RESULTS and rows == 2**29 - 1:
                assert large[name].numel() > 2**31
        found = [name for name in small if name in RESULTS]
        before = {name: small[name].clone() for name in found}
        last_programs(code, grid, with_tensors(few, small))
        last_programs(code, grid_of_many, with_tensors(many, large))
        for name in found:
            assert torch.equal(last(large[name], small[name]), small[name]), name
        changed |= {name for name in found if not torch.equal(small[name], before[name])}
    assert changed == RESULTS
