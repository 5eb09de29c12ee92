"""The backends, and which one serves a problem.

A backend is a module with ``unavailable(problem) -> str`` (why it cannot serve, or "") and either
``forward`` and ``backward`` (the recurrence, from the input projection on) or ``layers`` (the whole
stack of a module).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..cells.rnn import NONLINEARITIES
from ..tracing import makes_program
from . import cpu, cuda, reference, torch_native, triton

# In "auto"'s order.
BACKENDS = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "torch": torch_native,
    "reference": reference,
}


class Problem(NamedTuple):
    """What a choice of backend depends on."""

    device: str  # a device type
    dtype: torch.dtype
    cell: str  # a key of rnnfast.cells.CELLS
    projected: bool  # p is given: functional.rnn, not a module
    extras: tuple[str, ...] = ()  # arguments in use that nn.RNN does not have
    # What the launch of a kernel on a GPU depends on.
    units: int = 1  # of a head
    groups: int = 1  # directions times heads
    rows: int = 1  # of the batch
    index: int | None = None  # of the device; None: the current one

    @property
    def launch(self) -> tuple:
        """All that a launch depends on, to be remembered by."""
        where = self.device, self.index, self.dtype
        return *where, self.units, self.groups, self.rows, "norm" in self.extras


def rows_for_choice(rows: int) -> int:
    """The size of a batch that a choice depends on: a usual one in torch.compile, since a choice
    by the size would make a graph for each, and where a program for all sizes is made."""
    return 64 if torch.compiler.is_compiling() or makes_program() else rows


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this problem."""


def select(name: str, problem: Problem) -> str:
    """The backend to use: ``name`` itself, or for "auto" the first that serves.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: the named one cannot serve; the message says why. There is no fallback.
    """
    if name == "auto":  # the last one serves everything
        return next(n for n in BACKENDS if not passed_over(n, problem))
    if name not in BACKENDS:
        raise ValueError(f"backend: given {name!r}, wanted one of {['auto', *BACKENDS]}")
    reason = BACKENDS[name].unavailable(problem)
    if reason:
        raise BackendError(f"backend {name!r} cannot serve: {reason}")
    return name


def passed_over(name: str, problem: Problem) -> str:
    """Why "auto" does not take this backend; "" where it would."""
    why = BACKENDS[name].unavailable(problem)
    if why or name not in ("cuda", "triton"):
        return why
    (ours, theirs), whose = BACKENDS[name].estimates(problem), "torch"
    if torch_native.unavailable(problem):
        theirs = float("inf")
    # Estimates of kernels that keep W_hh, in CUDA and in Triton, are too unlike to be compared.
    if name == "cuda" and cuda.streams(problem) and not triton.unavailable(problem):
        of_triton = triton.estimates(problem)[0]
        if of_triton < theirs:
            theirs, whose = of_triton, "triton"
    return (
        "" if ours < theirs else f"{ours:.2f} us a step against {whose}'s {theirs:.2f} (estimated)"
    )


def refusals(problem: Problem) -> dict[str, str]:
    """{backend: why it cannot serve, or ""}, in the order in which "auto" asks."""
    return {name: backend.unavailable(problem) for name, backend in BACKENDS.items()}


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in list(NONLINEARITIES):  # a list: what cannot be hashed is refused, too
        raise ValueError(
            f"Unknown nonlinearity '{nonlinearity}'. Select from "
            + ", ".join(f"'{n}'" for n in NONLINEARITIES)
            + "."
        )
