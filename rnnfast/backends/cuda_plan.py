"""Which CUDA kernel runs a call: launch plans of the extension, from a size and a GPU's facts."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..recurrence.precision import rounds_to_tf32

try:
    EXTENSION = importlib.import_module("rnnfast._C")
except ImportError:  # the cpu backend says why
    EXTENSION = None

Plan = Any  # rnnfast._C.CudaPlan

# The file of tests/proof/emulation.py: the kernels compute on CPU tensors then, slowly. For tests.
EMULATION = os.environ.get("RNNFAST_EMULATION", "")
# Names of kernels, as `Wanted` of csrc/cuda/host/plan.h has them.
NAMES = {"": 0, "streaming": -1, "single_block": 1} | {f"cluster{n}": n for n in (2, 4, 8, 16)}


def _wanted() -> tuple[int, ...]:
    """The plan that the environment names instead of the estimate, for tests and benchmarks."""
    name, columns = (os.environ.get(f"RNNFAST_CUDA_{n}", "") for n in ("KERNEL", "COLUMNS"))
    if name not in NAMES:
        raise ValueError(f"RNNFAST_CUDA_KERNEL: given {name!r}, wanted one of {list(NAMES)}")
    if columns and not columns.isdecimal():
        raise ValueError(f"RNNFAST_CUDA_COLUMNS: given {columns!r}, wanted rows of the batch")
    return NAMES[name], int(columns or 0)


WANTED = _wanted()
# Plans that were measured in this process, by size and device: they replace the estimate.
TUNED: dict[tuple, tuple[int, ...]] = {}


class Device(NamedTuple):
    """Facts of a GPU."""

    name: str
    capability: int  # 10 major + minor
    multiprocessors: int
    shared_memory: int  # bytes a block may have
    clusters: tuple[int, int, int, int] = (0, 0, 0, 0)  # of 2, 4, 8, 16 blocks, at once


def _load() -> ModuleType | None:
    """The module with the kernels; None where they were not compiled."""
    if not EMULATION:
        return EXTENSION if hasattr(EXTENSION, "cuda_forward") else None
    loader = importlib.machinery.ExtensionFileLoader("_emulated", EMULATION)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


KERNELS = _load()


def unusable(kind: str, index: int | None) -> str:
    """Why the code that was compiled does not run on this device, or with its driver."""
    if EMULATION:
        return ""
    return code_refused(torch.cuda.current_device() if index is None else index)


@functools.cache
def code_refused(index: int) -> str:
    with torch.cuda.device(index):
        return KERNELS.cuda_unusable()


def planned(
    kind: str,
    index: int | None,
    dtype: torch.dtype,
    units: int,
    groups: int,
    rows: int,
    norm: bool,
):
    """The launch plan, or the reason why there is none (`refused`)."""
    mode = mode_of(dtype)
    size, device = (mode, units, groups, rows, norm), device_of(kind, index, mode)
    return plan_for(*size, device, TUNED.get((size, device), WANTED))


@functools.lru_cache
def plan_for(
    mode: str,
    units: int,
    groups: int,
    rows: int,
    norm: bool,
    device: Device,
    wanted: tuple[int, ...] = (),
):
    return (KERNELS or EXTENSION).cuda_plan(mode, units, groups, rows, norm, *device, *wanted)


def mode_of(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32" if rounds_to_tf32() else "exact"
    return str(dtype).removeprefix("torch.")


def device_of(kind: str, index: int | None, mode: str) -> Device:
    if EMULATION:
        return Device("the emulation", 90, 1, 227 << 10, (1, 1, 1, 1))
    return gpu(torch.cuda.current_device() if index is None else index, mode)


@functools.cache
def gpu(index: int, mode: str) -> Device:
    facts, clusters = torch.cuda.get_device_properties(index), (0, 0, 0, 0)
    # A device or driver that cannot run the kernels cannot answer questions about them either.
    if KERNELS is not None and facts.major >= 9 and not code_refused(index):
        with torch.cuda.device(index):
            clusters = tuple(KERNELS.cuda_clusters(mode, index))
    return Device(
        facts.name,
        10 * facts.major + facts.minor,
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,
        clusters,
    )
