"""Recurrences to compute, what the backends make of them, and the judge's word on it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import testing
from rnnfast.backends import BACKENDS, cpu, reference
from rnnfast.cells.rnn import Options
from rnnfast.precision import arithmetic
from rnnfast.testing import judge_backward, judge_forward

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NONLINEARITIES = ["tanh", "relu", "sigmoid"]
RESULTS = ["y", "h_n", "dp", "dw_hh", "dh_0"]
NORM_RESULTS = ["ahat", "rstd", "dgamma", "dbeta"]

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


class Case(NamedTuple):
    p: Tensor  # [T, B, D * H]
    w_hh: Tensor  # [D, H, H / heads]
    gamma: Tensor | None  # [D * H]
    beta: Tensor | None
    h_0: Tensor | None  # [D, B, H]
    lengths: Tensor | None  # [B]
    reset: Tensor | None  # [T, B]
    grad_y: Tensor | None
    grad_h_n: Tensor | None
    options: Options = Options()

    @property
    def nonlinearity(self) -> str:
        return self.options.nonlinearity

    def to(self, dtype: torch.dtype) -> Case:
        """gamma and beta in what the dtype computes in."""
        found = Case(*(cast(x, dtype) for x in self[:-1]), self.options)
        accurate = arithmetic(dtype)
        return found._replace(gamma=cast(self.gamma, accurate), beta=cast(self.beta, accurate))

    def with_options(self, **changed) -> Case:
        return self._replace(options=self.options._replace(**changed))


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or not x.is_floating_point() else x.to(dtype)


def make_case(
    T: int,
    B: int,
    H: int,
    D: int = 1,
    dtype: torch.dtype = torch.float32,
    nonlinearity: str = "tanh",
    seed: int = 0,
    lengths: bool = False,
    *,
    heads: int = 1,
    norm: bool = False,
    reset: bool = False,
    **options,
) -> Case:
    """A contracting one: ||W_hh||_2 = 0.95 in each head, gamma below 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = normal(D * heads, H // heads, H // heads)
    w *= 0.95 / torch.linalg.matrix_norm(w, 2)[:, None, None]
    w = w.view(D, H, H // heads)
    p, h_0, grad_y, grad_h_n = (
        normal(*shape) for shape in [(T, B, D * H), (D, B, H), (T, B, D * H), (D, B, H)]
    )
    n = torch.randint(0, T + 1, (B,), generator=generator) if lengths else None
    gamma = beta = cut = None
    if norm:
        gamma = 0.5 + torch.rand(D * H, generator=generator, dtype=torch.float64) / 2
        beta = normal(D * H) / 2
    if reset:
        cut = torch.rand(T, B, generator=generator) < 0.25
    chosen = Options(nonlinearity, heads, **options)
    return Case(p, w, gamma, beta, h_0, n, cut, grad_y, grad_h_n, chosen).to(dtype)


def run(case: Case, backend: str = "cpu") -> dict[str, Tensor | None]:
    """The backend's own forward and backward."""
    p, w_hh, gamma, beta, h_0, lengths, reset, grad_y, grad_h_n, options = case
    module, inputs = BACKENDS[backend], (h_0, lengths, reset)
    forward = module.forward(p, None, None, None, w_hh, gamma, beta, *inputs, options)
    y, _, ahat, rstd = forward
    saved = (y, None, None, w_hh, gamma, beta, ahat, rstd)
    backward = module.backward(grad_y, grad_h_n, *saved, *inputs, None, True, True, options)
    dp, _, _, _, dw_hh, dgamma, dbeta, dh_0 = backward
    found = dict(zip(("y", "h_n", "ahat", "rstd"), forward))
    return found | {"dp": dp, "dw_hh": dw_hh, "dgamma": dgamma, "dbeta": dbeta, "dh_0": dh_0}


def run_differentiated(case: Case) -> dict[str, Tensor | None]:
    """The loop of the reference, differentiated by PyTorch."""
    case, names, leaves = _leaves(case)
    inputs = (case.h_0, case.lengths, case.reset, case.options)
    found = reference.forward(case.p, None, None, None, *case[1:4], *inputs)
    return _gradients(case, names, leaves, dict(zip(("y", "h_n", "ahat", "rstd"), found)))


def run_functional(case: Case, backend: str = "cpu") -> dict[str, Tensor | None]:
    """Through functional.rnn and autograd: all but ahat and rstd."""
    case, names, leaves = _leaves(case)
    f, heads, eps, window, limit, _ = case.options
    y, h_n = rnnfast.functional.rnn(
        case.p, case.w_hh, case.h_0, lengths=case.lengths, reset=case.reset, nonlinearity=f,
        num_heads=heads, norm_weight=case.gamma, norm_bias=case.beta, norm_eps=eps,
        bptt_window=window, clip_state_grad=limit, backend=backend,
    )  # fmt: skip
    return _gradients(case, names, leaves, {"y": y, "h_n": h_n})


def _leaves(case: Case) -> tuple[Case, list[str], list[Tensor]]:
    names = [n for n in ("p", "w_hh", "gamma", "beta", "h_0") if getattr(case, n) is not None]
    leaves = [getattr(case, name).detach().requires_grad_() for name in names]
    return case._replace(**dict(zip(names, leaves))), names, leaves


def _gradients(
    case: Case, names: list[str], leaves: list[Tensor], found: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    given = ((found["y"], case.grad_y), (found["h_n"], case.grad_h_n))
    outputs, gradients = zip(*((x, g) for x, g in given if g is not None))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    nothing = dict.fromkeys(RESULTS + NORM_RESULTS)
    found = {name: x if x is None else x.detach() for name, x in found.items()}
    return nothing | found | {f"d{name}": grad for name, grad in zip(names, grads)}


def own_rounding(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """The reference's operations round in the dtype they compute in, 16 bits included."""
    return {"u_operand": torch.finfo(dtype).eps / 2} if backend == "reference" else {}


def judge(case: Case, found: dict[str, Tensor | None], **options) -> list[testing.Verdict]:
    p, w_hh, gamma, beta, *inputs, grad_y, grad_h_n, o = case
    y, h_n, dp, dw_hh, dh_0 = (found[name] for name in RESULTS)
    ahat, rstd, dgamma, dbeta = (found[name] for name in NORM_RESULTS)
    forward = (p, w_hh, gamma, beta, *inputs, o, y, h_n, ahat, rstd)
    saved = (y, w_hh, gamma, beta, ahat, rstd)
    backward = (grad_y, grad_h_n, *saved, *inputs, o, dp, dw_hh, dgamma, dbeta, dh_0)
    return [*judge_forward(*forward, **options), *judge_backward(*backward, **options)]


def assert_good(case: Case, found: dict[str, Tensor | None], **options) -> None:
    bad = [str(verdict) for verdict in judge(case, found, **options) if not verdict.good]
    shape = tuple(case.p.shape), tuple(case.w_hh.shape)
    assert not bad, f"{shape} {case.p.dtype} {case.options}: " + "; ".join(bad)
