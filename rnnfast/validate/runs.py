"""Runs a case with a backend and judges the results, which are on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import BACKENDS, reference
from ..recurrence.record import FIELDS
from ..testing import Verdict, judge_backward, judge_forward, judge_record
from .cases import Case

RESULTS = ["y", "h_n", "dp", "dw_hh", "dh_0"]
OF_PYTORCH = ("reference", "torch")  # backends
NORM_RESULTS = ["ahat", "rstd", "dgamma", "dbeta"]


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
    p, w_hh, gamma, beta, h_0, lengths, reset, grad_y, grad_h_n, options = case.on(device)
    module, inputs = BACKENDS[backend], (h_0, lengths, reset)
    forward = module.forward(p, None, None, None, w_hh, gamma, beta, *inputs, options)
    y, _, ahat, rstd = forward
    saved = (y, None, None, w_hh, gamma, beta, ahat, rstd)
    buffer = None
    if recorded:
        shape = w_hh.shape[0], len(p), p.shape[1] if options.per_sample else 1, len(FIELDS)
        buffer = torch.empty(shape, dtype=torch.float64, device=device)
    backward = module.backward(grad_y, grad_h_n, *saved, *inputs, buffer, True, True, options)
    dp, _, _, _, dw_hh, dgamma, dbeta, dh_0 = backward
    found = dict(zip(("y", "h_n", "ahat", "rstd"), forward))
    found |= {"dp": dp, "dw_hh": dw_hh, "dgamma": dgamma, "dbeta": dbeta, "dh_0": dh_0}
    found |= {"record": buffer} if recorded else {}
    return {name: x if x is None else x.cpu() for name, x in found.items()}


def run_differentiated(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """Runs the reference's loop, which PyTorch differentiates."""
    case, names, leaves = leaves_of(case.on(device))
    inputs = (case.h_0, case.lengths, case.reset, case.options)
    found = reference.forward(case.p, None, None, None, *case[1:4], *inputs)
    found = gradients_of(case, names, leaves, dict(zip(("y", "h_n", "ahat", "rstd"), found)))
    return {name: x if x is None else x.cpu() for name, x in found.items()}


def leaves_of(case: Case) -> tuple[Case, list[str], list[Tensor]]:
    names = [n for n in ("p", "w_hh", "gamma", "beta", "h_0") if getattr(case, n) is not None]
    leaves = [getattr(case, name).detach().requires_grad_() for name in names]
    return case._replace(**dict(zip(names, leaves))), names, leaves


def gradients_of(
    case: Case, names: list[str], leaves: list[Tensor], found: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    given = ((found["y"], case.grad_y), (found["h_n"], case.grad_h_n))
    outputs, gradients = zip(*((x, g) for x, g in given if g is not None))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    nothing = dict.fromkeys(RESULTS + NORM_RESULTS)
    found = {name: x if x is None else x.detach() for name, x in found.items()}
    return nothing | found | {f"d{name}": grad for name, grad in zip(names, grads)}


def own_rounding(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """The roundoff of PyTorch's operations, which round in their own dtype, also in 16 bits."""
    return {"u_operand": torch.finfo(dtype).eps / 2} if backend in OF_PYTORCH else {}


def judge(case: Case, found: dict[str, Tensor | None], **options) -> list[Verdict]:
    """Budget (ii), with each step restarted. Judges a record, if there is one, row by row."""
    p, w_hh, gamma, beta, *inputs, grad_y, grad_h_n, o = case
    y, h_n, dp, dw_hh, dh_0 = (found[name] for name in RESULTS)
    ahat, rstd, dgamma, dbeta = (found[name] for name in NORM_RESULTS)
    forward = (p, w_hh, gamma, beta, *inputs, o, y, h_n, ahat, rstd)
    saved = (y, w_hh, gamma, beta, ahat, rstd)
    backward = (grad_y, grad_h_n, *saved, *inputs, o, dp, dw_hh, dgamma, dbeta, dh_0)
    verdicts = [*judge_forward(*forward, **options), *judge_backward(*backward, **options)]
    if found.get("record") is not None:
        recorded = (grad_y, grad_h_n, y, w_hh, *inputs, o, dp, found["record"])
        verdicts += judge_record(*recorded, **options)
    return verdicts
