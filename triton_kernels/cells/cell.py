"""The interface of a cell: three functions that Triton compiles into their loops.

Values are blocks [units, rows] in float32; a plural is a tuple of them. F is the name of the
cell's nonlinearity. Kernels receive the functions; no kernel knows the name of a cell.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.runtime import JITFunction


class Cell(NamedTuple):
    # (pre-activations by gate, carried states before, F) -> (h, carried states, saved values).
    # h is put out and multiplied by W_hh. Carried states and saved values are those beside h.
    step: JITFunction
    # (gradient of h, gradients of the carried states, saved values with h first, F)
    #   -> (gradients of the pre-activations, gradients of the carried states before).
    step_back: JITFunction
    # (saved values with h first, F) -> what the record's gain is the mean of.
    gain: JITFunction
    nonlinearity: str = ""
