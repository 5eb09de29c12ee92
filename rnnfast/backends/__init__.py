"""The backends, and the choice of one for a problem.

A backend is a module with ``unavailable(problem) -> str`` (why it cannot run, or "") and either
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
    """The facts on which the choice of a backend depends."""

    device: str  # a device type
    dtype: torch.dtype
    cell: str  # a key of rnnfast.cells.CELLS
    projected: bool  # p is given: functional.rnn, not a module
    extras: tuple[str, ...] = ()  # arguments in use that nn.RNN does not have
    # The launch of a kernel on a GPU depends on these.
    units: int = 1  # of a head
    groups: int = 1  # directions times heads
    rows: int = 1  # of the batch
    index: int | None = None  # of the device; None: the current one
    projects_h: bool = False  # an LSTM with proj_size

    @property
    def launch(self) -> tuple:
        """The facts on which a launch depends: the key under which its plan is kept."""
        where = self.device, self.index, self.dtype
        return *where, self.units, self.groups, self.rows, "norm" in self.extras


def rows_for_choice(rows: int) -> int:
    """The batch size that a choice uses. torch.compile would make a graph for each size, and a
    program may be made for all sizes: there it is a usual size."""
    return 64 if torch.compiler.is_compiling() or makes_program() else rows


class BackendError(RuntimeError):
    """The named backend cannot run this call."""


def select(name: str, problem: Problem) -> str:
    """The backend to use: ``name`` itself, or for "auto" the first that can run the problem.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: the named one cannot run it; the message says why. There is no fallback.
    """
    if name == "auto" and problem.projects_h:
        name = "torch"
    if name == "auto":  # the last one can run everything
        return next(n for n in BACKENDS if not passed_over(n, problem))
    if name not in BACKENDS:
        raise ValueError(f"backend: given {name!r}, wanted one of {['auto', *BACKENDS]}")
    reason = unavailable(name, problem)
    if reason:
        raise BackendError(f"backend {name!r} cannot run this call: {reason}")
    return name


def unavailable(name: str, problem: Problem) -> str:
    """Why this backend cannot run it, or ""."""
    why = BACKENDS[name].unavailable(problem)
    if not problem.projects_h:
        return why
    if name != "torch":
        return "it has no proj_size; torch's kernels do"
    return why and f"proj_size takes torch's kernels, and {why}"


def passed_over(name: str, problem: Problem) -> str:
    """Why "auto" does not take this backend; "" where it would."""
    why = unavailable(name, problem)
    if why or name not in ("cuda", "triton"):
        return why
    (ours, theirs), whose = BACKENDS[name].estimates(problem), "torch"
    if torch_native.unavailable(problem):
        theirs = float("inf")
    # Estimates of kernels that keep W_hh, in CUDA and in Triton, are too different to be compared.
    if name == "cuda" and cuda.streams(problem) and not triton.unavailable(problem):
        of_triton = triton.estimates(problem)[0]
        if of_triton < theirs:
            theirs, whose = of_triton, "triton"
    return (
        "" if ours < theirs else f"{ours:.2f} us a step against {whose}'s {theirs:.2f} (estimated)"
    )


def refusals(problem: Problem) -> dict[str, str]:
    """{backend: why it cannot run this, or ""}, in the order in which "auto" asks."""
    return {name: unavailable(name, problem) for name in BACKENDS}


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in list(NONLINEARITIES):  # a list also refuses a value without a hash
        raise ValueError(
            f"Unknown nonlinearity '{nonlinearity}'. Select from "
            + ", ".join(f"'{n}'" for n in NONLINEARITIES)
            + "."
        )
