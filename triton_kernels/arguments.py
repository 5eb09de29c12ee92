"""Groups of a kernel's arguments. Fields are tensors outside of a kernel and pointers inside.

Numbers are arguments of their own: Triton compiles a new kernel for a number in a group that is 1
or a multiple of 16, and `do_not_specialize` does not reach into a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Weights(NamedTuple):
    w: Any  # W_hh [GROUPS, SW, SW]
    gamma: Any = None
    beta: Any = None


class Rows(NamedTuple):
    """Which steps a row of the batch has, and where its state is cut."""

    lengths: Any = None
    reset: Any = None


class Results(NamedTuple):
    """Results of forward."""

    y: Any
    h_n: Any
    ahat: Any = None
    rstd: Any = None


class Outside(NamedTuple):
    """Gradients that come from outside of the recurrence."""

    y: Any = None
    h_n: Any = None


class Normed(NamedTuple):
    """Saved values of forward's layer norm."""

    ahat: Any = None
    rstd: Any = None


class Gradients(NamedTuple):
    """Results of backward; carry is for the record."""

    dp: Any
    dh_0: Any = None
    dgamma: Any = None
    dbeta: Any = None
    carry: Any = None


class Exchange(NamedTuple):
    """How the programs of a team wait for one another, and add up their sums."""

    counter: Any
    sums: Any


class Form(NamedTuple):
    """Constants that a kernel is compiled for."""

    S: int  # units of a group
    HEADS: int
    GROUPS: int  # directions times heads
    F: str  # the nonlinearity of the cell, or ""
    UNIT: int  # values between two places where a row may begin
    BS: int = 0  # units of a program
    BB: int = 0  # rows of a program
    SW: int = 0  # units of a row of W_hh, zeros beyond S
    PRECISION: str = ""
    BK: int = 0  # units that enter a product at a time
    BP: int = 0  # programs of a team, as a power of two
    KEPT: bool = False  # whether a program of a team keeps its weights in registers
    CLIPS: bool = False
    WINDOWED: bool = False
    RECOMPUTE_STATE: bool = False  # f' comes from ahat, not from y
