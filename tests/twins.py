"""A module of torch and one of rnnfast from the same weights, and what is compared between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast.backends import cuda_plan, triton

# What is compared to rounding is so in float64, which leaves no room for another computation; where
# kernels for GPUs run on a CPU in float32, which is all that they have.
EXACT = torch.float32 if triton.INTERPRETED or cuda_plan.EMULATION else torch.float64


Hx = Tensor | tuple[Tensor, Tensor]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def twins(
    backend: str, *args, kind: str = "RNN", dtype=EXACT, **options
) -> tuple[nn.RNNBase, nn.RNNBase]:
    """The module of torch.nn of that kind, and rnnfast's with the same weights."""
    old = getattr(nn, kind)(*args, dtype=dtype, **options)
    new = getattr(rnnfast, kind)(*args, dtype=dtype, backend=backend, **options)
    new.load_state_dict(old.state_dict())
    return old, new


def for_kind(kind, options):
    """Without arguments that modules with gates do not have."""
    return {k: v for k, v in options.items() if kind == "RNN" or k != "nonlinearity"}


def start(kind: str, h: Tensor) -> Hx:
    """hx of a module of that kind: h, and for an LSTM a c beside it."""
    return (h, 1.5 * h.flip(-1)) if kind == "LSTM" else h


def tensors(hx: Hx | None) -> tuple[Tensor, ...]:
    """The states of hx or h_n, one by one."""
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)


def outputs(module: Callable, *inputs, **options) -> list[Tensor]:
    """The output, every last state, and the cell states that the module returns."""
    y, last, *cells = module(*inputs, **options)
    return [y, *tensors(last), *cells]


def mapped(f: Callable, *of: Hx) -> Hx:
    """f of each state, or of the states of that name in several hx."""
    if isinstance(of[0], Tensor):
        return f(*of)
    return tuple(map(f, *of))


def leaf(hx: Hx) -> Hx:
    """A copy of hx whose gradients are wanted."""
    copies = tuple(h.detach().clone().requires_grad_() for h in tensors(hx))
    return copies[0] if isinstance(hx, Tensor) else copies


def results(module: nn.Module, input, hx: Hx | None = None, **options) -> dict[str, Tensor]:
    """Output, h_n and every gradient under fixed gradients of all outputs."""
    data = input.data if isinstance(input, PackedSequence) else input
    leaves = {"input": data.detach().clone().requires_grad_()}
    if hx is not None:
        hx = leaf(hx)
        leaves |= dict(zip(("hx", "cx"), tensors(hx)))
    fresh = leaves["input"]
    if isinstance(input, PackedSequence):
        fresh = PackedSequence(fresh, *input[1:])
    output, last, *cells = module(fresh, hx, **options)
    found = dict(zip(("output", "h_n", "c_n"), (output, *tensors(last))))
    found |= dict(zip(("cells",), cells))
    found = {n: x.data if isinstance(x, PackedSequence) else x for n, x in found.items()}
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * weight.to(x.device)).sum()
    leaves |= {name: x for name, x in module.named_parameters() if x.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"d {name}": g for name, g in zip(leaves, gradients)}


# The exp and reciprocal of CUDA kernels err by 2 ulp and 1, and sums of one unit cancel to a
# hundredth of their terms.
APPROXIMATE = bool(cuda_plan.EMULATION) or torch.cuda.is_available()
SAME = {torch.float64: 1e-12, torch.float32: 2e-5 if APPROXIMATE else 1e-5}


def assert_same(actual: Tensor, wanted: Tensor, what: str = "") -> None:
    """Equal shape and dtype, and equal to rounding: SAME of the largest entry."""
    assert actual.shape == wanted.shape, what
    assert actual.dtype == wanted.dtype, what
    if wanted.numel():
        error = (actual.to(wanted.device) - wanted).abs().max().item()
        assert error <= SAME[wanted.dtype] * wanted.abs().max().item(), f"{what}: error {error}"


def assert_same_results(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert_same(actual[name], wanted[name], name)


def outcome(call):
    """The type and text of what `call` raises, or the type of what it returns."""
    try:
        return type(call()), ""
    except Exception as error:
        return type(error), str(error)
