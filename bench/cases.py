"""A few points for pytest-benchmark, to compare commits. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rnnfast.bench.gate import Gate, shortened
from rnnfast.bench.providers import OURS, Provider
from rnnfast.bench.providers.torch_rnn import TorchRNN
from rnnfast.bench.workload import BOTH, Workload

POINTS = [(1, 1, 1), (128, 1, 64), (128, 16, 64), (256, 32, 256), (64, 64, 512)]
CASES_OF = [TorchRNN(), *OURS]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", CASES_OF, ids=lambda provider: provider.name)
@pytest.mark.parametrize("shape", POINTS, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_and_backward(benchmark, shape: tuple[int, int, int], provider: Provider):
    work = Workload(*shape)
    if why := provider.unavailable(work):
        pytest.skip(why)
    gate = Gate(shortened(work))
    assert gate.complaints(provider.build(shortened(work), gate.data)) == []
    layer = provider.build(work, work.data())
    benchmark.group = f"T, B, H = {shape}"
    benchmark(layer.calls[BOTH])
