"""nn.RNN and rnnfast.RNN from the same weights, and what is compared between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast.backends import cuda_plan, triton

# What is compared to rounding is so in float64, which leaves no room for another computation; where
# kernels for GPUs run on a CPU in float32, which is all that they have.
EXACT = torch.float32 if triton.INTERPRETED or cuda_plan.EMULATION else torch.float64


def twins(backend: str, *args, dtype=EXACT, **options) -> tuple[nn.RNN, rnnfast.RNN]:
    old = nn.RNN(*args, dtype=dtype, **options)
    new = rnnfast.RNN(*args, dtype=dtype, backend=backend, **options)
    new.load_state_dict(old.state_dict())
    return old, new


def results(module: nn.Module, input, hx: Tensor | None = None, **options) -> dict[str, Tensor]:
    """Output, h_n and every gradient under fixed gradients of both outputs."""
    data = input.data if isinstance(input, PackedSequence) else input
    leaves = {"input": data.detach().clone().requires_grad_()}
    if hx is not None:
        leaves["hx"] = hx.detach().clone().requires_grad_()
    fresh = leaves["input"]
    if isinstance(input, PackedSequence):
        fresh = PackedSequence(fresh, *input[1:])
    output, h_n = module(fresh, leaves.get("hx"), **options)
    output = output.data if isinstance(output, PackedSequence) else output
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    weight_n = torch.randn(h_n.shape, generator=generator, dtype=torch.float64)
    leaves |= {name: x for name, x in module.named_parameters() if x.requires_grad}
    loss = (output * weight.to(output.device)).sum() + (h_n * weight_n.to(output.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"output": output.detach(), "h_n": h_n.detach()}
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
