"""A few points for pytest-benchmark, to compare commits: see README.md here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.rnn import gate
from bench.rnn.points import Point
from bench.rnn.providers import PROVIDERS, Layer, Provider, make_problem

POINTS = [(1, 1, 1), (128, 1, 64), (128, 16, 64), (256, 32, 256), (64, 64, 512)]
CASES_OF = [provider for provider in PROVIDERS if provider.name in ("torch", "rnnfast")]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", CASES_OF, ids=lambda provider: provider.name)
@pytest.mark.parametrize("shape", POINTS, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_and_backward(benchmark, shape: tuple[int, int, int], provider: Provider):
    if why := provider.unavailable():
        pytest.skip(why)
    problem = gate.gate_problem(Point(*shape, "case"))
    assert gate.complaints(provider.build(problem), problem) == []
    layer: Layer = provider.build(make_problem(*shape))
    benchmark.group = f"T, B, H = {shape}"
    benchmark(layer.both)
