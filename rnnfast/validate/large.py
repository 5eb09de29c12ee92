"""Checks an input projection of more than 2^31 elements, which needs 64-bit offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..cells import CELLS
from ..cells.cell import Cell
from ..recurrence.groups import Wanted
from .cases import cell_name, make_case
from .kernels import Where
from .memory import free_memory
from .rows import Row
from .runs import by_name, gradients_by_name, judge

T, B, H = 33, 2**20, 64  # B: of a cell with one gate
SAMPLED = 64  # judged rows of the batch, with the first and the last
FILLED = 1021  # a prime, so that rows differ if a wrong offset confuses them
FACTOR = 1.15  # room for the backend's own memory


def bytes_needed(cell: Cell, rows: int, dtype: torch.dtype) -> float:
    """Bytes of p, dp, y, grad_y, what forward saves, and six states."""
    gates = len(cell.gates) * (3 if cell.apart else 2)  # of a gate apart two gradients
    values = gates + 2 + 2 * len(cell.saved)  # some are saved in float32
    return FACTOR * (values * T + 6 * len(cell.states)) * rows * H * dtype.itemsize


def check_large(row: Row, where: Where) -> None:
    """Budget (ii) on some rows of the batch, which are independent. The gradient of all other rows
    is 0, so that dw_hh depends on these rows only."""
    dtype, device, name = where.arithmetic.dtype, where.device, where.cells[0]
    cell = CELLS[cell_name(name)]
    size = -(-B // len(cell.gates))  # rows of the batch
    needed, free = bytes_needed(cell, size, dtype), free_memory(device)
    if needed > free:
        row.left_out = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return
    row.begin(f"{name}, T = {T}, B = {size}, H = {H}")
    case = make_case(T, SAMPLED, H, dtype=dtype, nonlinearity=name)
    filler = make_case(T, FILLED, H, dtype=dtype, nonlinearity=name, seed=1).p.to(device)
    rows = torch.linspace(0, size - 1, SAMPLED, dtype=torch.float64).long().to(device)

    def whole(x: Tensor | None) -> Tensor | None:
        """The whole tensor, with 0 in the rows that are not judged."""
        if x is None:
            return None
        found = torch.zeros(x.shape[0], size, x.shape[2], dtype=dtype, device=device)
        return found.index_copy_(1, rows, x.to(device))

    p = torch.empty(T, size, filler.shape[2], dtype=dtype, device=device)
    for begin in range(0, size, FILLED):
        count = min(FILLED, size - begin)
        p[:, begin : begin + count] = filler[:, :count]
    p.index_copy_(1, rows, case.p.to(device))
    of_rows = ("h_0", "c_0", "grad_y", "grad_h_n", "grad_c_n")
    large = case.on(device)._replace(p=p, **{n: whole(getattr(case, n)) for n in of_rows})
    module, options = BACKENDS[where.backend], case.options
    results = module.forward(p, large.weights, large.states, large.rows, options)
    kept = large.kept(results.y, results.saved)
    gradients = module.backward(large.given, kept, None, Wanted(), options)
    found = by_name(results) | gradients_by_name(large, gradients)
    beyond = int(found["dp"].count_nonzero())
    whole_batch = ("dw_hh", "db_hh", "dgamma", "dbeta")
    found = {
        name: x if x is None else (x if name in whole_batch else x[:, rows]).cpu()
        for name, x in found.items()
    }
    row.take_steps(judge(case, found, **where.arithmetic.rounding(where.backend)))
    if beyond != int(found["dp"].count_nonzero()):
        row.complain("dp: not 0 in rows that have no gradient")
