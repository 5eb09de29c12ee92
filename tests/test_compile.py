"""torch.compile without graph breaks, torch.export, and the two ops as torch checks them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import rnnfast
from rnnfast.backends import cpu

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference", "torch"]
IN, H = 3, 4


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(backend: str = "cpu", **options) -> rnnfast.RNN:
    torch.manual_seed(0)
    return rnnfast.RNN(IN, H, backend=backend, **options)


def compiled(module: nn.Module, backend="aot_eager", **options):
    return torch.compile(module, fullgraph=True, backend=backend, **options)


def results(call, module: nn.Module, *args, **kwargs) -> list[Tensor]:
    """Outputs, and gradients of all floating inputs and parameters."""
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    y, h_n = call(*leaves, **kwargs)
    loss = (y**2).sum() + h_n.sum()
    floats = [a for a in leaves if a.is_floating_point()]
    grads = torch.autograd.grad(loss, [*floats, *module.parameters()])
    return [y.detach(), h_n.detach(), *grads]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, w in zip(found, wanted, strict=True):
        assert torch.equal(a, w)
