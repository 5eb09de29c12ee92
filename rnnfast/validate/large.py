"""Checks a tensor of more than 2^31 elements, which needs 64-bit offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..recurrence.groups import Wanted
from .cases import make_case
from .kernels import Where
from .memory import free_memory
from .rows import Row
from .runs import judge

T, B, H = 33, 2**20, 64
SAMPLED = 64  # judged rows of the batch, with the first and the last
FILLED = 1021  # a prime, so that rows differ if a wrong offset confuses them
FACTOR = 1.15  # room for the backend's own memory


def bytes_needed(dtype: torch.dtype) -> float:
    """Bytes of y, grad_y and dp, and of six states."""
    return FACTOR * (3 * T + 6) * B * H * dtype.itemsize


def check_large(row: Row, where: Where) -> None:
    """Budget (ii) on some rows of the batch, which are independent. The gradient of all other rows
    is 0, so that dw_hh depends on these rows only."""
    dtype, device = where.arithmetic.dtype, where.device
    needed, free = bytes_needed(dtype), free_memory(device)
    if needed > free:
        row.left_out = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return
    row.begin(f"tanh, T = {T}, B = {B}, H = {H}")
    case = make_case(T, SAMPLED, H, dtype=dtype)
    filler = make_case(T, FILLED, H, dtype=dtype, seed=1).p.to(device)
    rows = torch.linspace(0, B - 1, SAMPLED, dtype=torch.float64).long().to(device)

    def whole(x: Tensor) -> Tensor:
        """The whole tensor, with 0 in the rows that are not judged."""
        found = torch.zeros(x.shape[0], B, H, dtype=dtype, device=device)
        return found.index_copy_(1, rows, x.to(device))

    p = torch.empty(T, B, H, dtype=dtype, device=device)
    for begin in range(0, B, FILLED):
        count = min(FILLED, B - begin)
        p[:, begin : begin + count] = filler[:, :count]
    p.index_copy_(1, rows, case.p.to(device))
    large = case._replace(
        p=p,
        w_hh=case.w_hh.to(device),
        h_0=whole(case.h_0),
        grad_y=whole(case.grad_y),
        grad_h_n=whole(case.grad_h_n),
    )
    module, options = BACKENDS[where.backend], case.options
    y, states, saved, _ = module.forward(p, large.weights, large.states, large.rows, options)
    dp, weights, firsts = module.backward(
        large.given, large.kept(y, saved), None, Wanted(), options
    )
    found = {"y": y, "h_n": states.h, "dp": dp, "dh_0": firsts.h}
    found = {name: x[:, rows].cpu() for name, x in found.items()}
    found["dw_hh"] = weights.w_hh.view_as(large.w_hh).cpu()
    found |= dict.fromkeys(("ahat", "rstd", "dgamma", "dbeta"))
    row.take_steps(judge(case, found, **where.arithmetic.rounding(where.backend)))
    if int(dp.count_nonzero()) != int(found["dp"].count_nonzero()):
        row.complain("dp: not 0 in rows that have no gradient")
