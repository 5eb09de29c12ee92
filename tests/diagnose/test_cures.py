"""The measurement of cures: the gradient of torch's modules, read one step at a time, agrees with
the record."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import rnnfast

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sklearn", "tqdm")),
    reason="the extras of the demo are not installed",
)


def test_step_by_step_as_the_record():
    """One network, as torch's module and as ours."""
    from bench.cures.cures import Classifier, log_growth, log_growth_by_steps

    made = []
    for make, options in ((rnnfast.RNN, {"track_gradient_flow": True}), (nn.RNN, {})):
        torch.manual_seed(0)
        made.append(Classifier(make, **options))
    x, labels = torch.randn(4, 30, 8), torch.tensor([1, 2, 3, 4])
    growth = log_growth(made[0], x, labels)
    assert -2 < growth < -0.1
    assert log_growth_by_steps(made[1], x, labels) == pytest.approx(growth, rel=1e-4)


@pytest.mark.parametrize("name", ["torch.nn.LSTM", "torch.nn.GRU", "tanh, batch norm"])
def test_a_network_is_trained_and_read(name):
    from bench.cures.__main__ import half_life, table
    from bench.cures.cures import CURES, run
    from rnnfast.demo.tasks import digits_then_noise

    cure = next(cure for cure in CURES if cure.name == name)
    outcome = run(cure, digits_then_noise(5, seed=0, epochs=1, quick=True), seed=0)
    assert 0 <= outcome.accuracy <= 1
    assert outcome.first != outcome.last
    lines = table({cure: [outcome, outcome]}).splitlines()
    assert len(lines) == 3
    assert f"| {name} | {outcome.accuracy:.0%} (" in lines[2]
    assert f"{half_life(outcome.first):.3g}" in lines[2] or outcome.first >= 0
