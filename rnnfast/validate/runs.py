"""Runs a case with a backend and judges the results, which are on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import BACKENDS, reference
from ..recurrence.groups import Gradients, Results, Saved, States, Wanted, Weights
from ..recurrence.loop import RecurrenceGradients
from ..recurrence.record import FIELDS
from ..testing import Verdict, judge_backward, judge_forward, judge_record
from .cases import Case

RESULTS = ["y", "h_n", "dp", "dw_hh", "dh_0"]
OF_PYTORCH = ("reference", "torch")  # backends
NORM_RESULTS = ["ahat", "rstd", "dgamma", "dbeta"]
CELL_RESULTS = ["c_n", "dc_0", "db_hh", "cells", "cell_values"]  # of the cells that have them


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Sets the number of threads of torch and of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    case: Case, backend: str = "cpu", device: str = "cpu", recorded: bool = False
) -> dict[str, Tensor | None]:
    """Runs the backend's forward and backward. With ``recorded`` the results include the record
    [D, T, N, fields]; case.options.per_sample belongs to it."""
    case, module = case.on(device), BACKENDS[backend]
    options, p = case.options, case.p
    results = module.forward(p, case.weights, case.states, case.rows, options)
    buffer = None
    if recorded:
        shape = len(case.w_hh), len(p), p.shape[1] if options.per_sample else 1, len(FIELDS)
        buffer = torch.empty(shape, dtype=torch.float64, device=device)
    kept = case.kept(results.y, results.saved)
    gradients = module.backward(case.given, kept, buffer, Wanted(), options)
    found = by_name(results) | gradients_by_name(case, gradients)
    found |= {"record": buffer} if recorded else {}
    return {name: x if x is None else x.cpu() for name, x in found.items()}


def by_name(results: Results) -> dict[str, Tensor | None]:
    y, (h_n, c_n), (values, ahat, rstd), cells = results
    found = {"y": y, "h_n": h_n, "ahat": ahat, "rstd": rstd}
    return found | present({"c_n": c_n, "cell_values": values, "cells": cells})


def gradients_by_name(case: Case, gradients: Gradients | RecurrenceGradients) -> dict:
    """The gradients of a recurrence from p on."""
    dp, weights, (dh_0, dc_0) = gradients
    found = {
        "dp": dp,
        "dw_hh": weights.w_hh.view_as(case.w_hh),
        "dgamma": weights.gamma,
        "dbeta": weights.beta,
        "dh_0": dh_0,
    }
    return found | present({"dc_0": dc_0, "db_hh": weights.b_hh if case.apart else None})


def present(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The results that the cell has."""
    return {name: x for name, x in found.items() if x is not None}


def run_differentiated(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """Runs the reference's loop, which PyTorch differentiates."""
    case, names, leaves = leaves_of(case.on(device))
    found = reference.forward(case.p, case.weights, case.states, case.rows, case.options)
    found = gradients_of(case, names, leaves, by_name(found))
    return {name: x if x is None else x.cpu() for name, x in found.items()}


LEAVES = ("p", "w_hh", "gamma", "beta", "b_hh", "h_0", "c_0")


def leaves_of(case: Case) -> tuple[Case, list[str], list[Tensor]]:
    names = [n for n in LEAVES if getattr(case, n) is not None]
    leaves = [getattr(case, name).detach().requires_grad_() for name in names]
    return case._replace(**dict(zip(names, leaves))), names, leaves


def gradients_of(
    case: Case, names: list[str], leaves: list[Tensor], found: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    of = {"y": case.grad_y, "h_n": case.grad_h_n, "c_n": case.grad_c_n, "cells": case.grad_cells}
    given = ((found.get(name), g) for name, g in of.items())
    outputs, gradients = zip(*((x, g) for x, g in given if g is not None))
    # A window can cut every way to h_0.
    zeros = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(outputs, leaves, gradients, **zeros)
    nothing = dict.fromkeys(RESULTS + NORM_RESULTS)
    found = {name: x if x is None else x.detach() for name, x in found.items()}
    return nothing | found | {f"d{name}": grad for name, grad in zip(names, grads)}


def own_rounding(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """The roundoff of PyTorch's operations, which round in their own dtype, also in 16 bits."""
    return {"u_operand": torch.finfo(dtype).eps / 2} if backend in OF_PYTORCH else {}


def judge(case: Case, found: dict[str, Tensor | None], **options) -> list[Verdict]:
    """Budget (ii), with each step restarted. Judges a record, if there is one, row by row."""
    y, h_n, dp, dw_hh, dh_0 = (found[name] for name in RESULTS)
    ahat, rstd, dgamma, dbeta = (found[name] for name in NORM_RESULTS)
    c_n, dc_0, db_hh, cells, values = (found.get(name) for name in CELL_RESULTS)
    results = Results(y, States(h_n, c_n), Saved(values, ahat, rstd), cells)
    kept, o = case.kept(y, results.saved), case.options
    weights = Weights(None, None, db_hh, dw_hh.reshape(-1, dw_hh.shape[-1]), dgamma, dbeta)
    gradients = RecurrenceGradients(dp, weights, States(dh_0, dc_0))
    inputs = case.p, case.weights, case.states, case.rows, o
    verdicts = judge_forward(*inputs, results, **options)
    verdicts += judge_backward(case.given, kept, o, gradients, **options)
    if found.get("record") is not None:
        verdicts += judge_record(case.given, kept, o, dp, found["record"], **options)
    return verdicts
