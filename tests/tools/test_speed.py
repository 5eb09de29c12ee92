"""rnnfast is worth installing: where a step is small, it is faster than nn.RNN by a wide margin.

Only margins that a busy machine cannot turn over are tested; figures are the benchmark's business.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast.backends import cpu
from rnnfast.bench import points
from rnnfast.bench.providers.loop import NormedLoop
from rnnfast.bench.workload import Workload

pytestmark = pytest.mark.proof

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension is not built")


@needs_cpu
@pytest.mark.parametrize(
    ("T", "B", "H"), [(200, 1, 16), (128, 1, 64), (128, 16, 64), (64, 32, 128)]
)
def test_training_step_of_a_small_model_is_faster_than_nn_rnn(T, B, H):
    theirs, ours = best_seconds(T, B, H, nn.RNN(H, H), rnnfast.RNN(H, H, backend="cpu"))
    assert theirs > 1.2 * ours


@needs_cpu
@pytest.mark.parametrize("threads_a_core", [2, 8])
@pytest.mark.parametrize(("T", "B", "H"), [(5, 4, 8), (50, 16, 64), (64, 32, 128)])
def test_more_threads_than_cores_are_no_slower_than_in_nn_rnn(T, B, H, threads_a_core):
    before = torch.get_num_threads()
    torch.set_num_threads(threads_a_core * cpu.cores())
    try:
        theirs, ours = best_seconds(
            T, B, H, nn.RNN(H, H), rnnfast.RNN(H, H, backend="cpu"), turns=3
        )
    finally:
        torch.set_num_threads(before)
    assert theirs > ours


GATED = [
    (nn.LSTM, rnnfast.LSTM, (128, 16, 64)),
    (nn.LSTM, rnnfast.LSTM, (256, 32, 256)),
    (nn.GRU, rnnfast.GRU, (128, 16, 64)),
]


@needs_cpu
@pytest.mark.parametrize(("theirs", "ours", "size"), GATED, ids=["lstm", "lstm large", "gru"])
def test_training_step_of_gated_layers_reaches_its_target(theirs, ours, size):
    """The targets of rnnfast.bench.points, on 2 threads."""
    H = size[-1]
    work = Workload(*size, cell=ours.__name__.lower())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        their_s, our_s = best_seconds(*size, theirs(H, H), ours(H, H, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    wanted = points.target(work, "native")
    assert their_s >= wanted * our_s, f"{work}: {their_s / our_s:.2f}x of {wanted:g}x"


@needs_cpu
def test_layer_norm_is_faster_than_the_loop_it_replaces():
    """A loop of two nn.Linear, nn.LayerNorm and tanh at each step."""
    T, B, H = 128, 32, 128
    models = NormedLoop(H, at_once=False), rnnfast.RNN(H, H, norm="layer", backend="cpu")
    theirs, ours = best_seconds(T, B, H, *models)
    assert theirs > 2 * ours


def best_seconds(T: int, B: int, H: int, *models: nn.Module, turns: int = 9) -> list[float]:
    """Times of five training steps of each, in turns."""
    x = torch.randn(T, B, H, requires_grad=True)

    def seconds(model: nn.Module) -> float:
        begin = time.perf_counter()
        for _ in range(5):
            torch.autograd.grad(model(x)[0].sum(), [x, *model.parameters()])
        return time.perf_counter() - begin

    for model in models:
        seconds(model)  # warm-up
    times = [[seconds(model) for model in models] for _ in range(turns)]  # in turns
    return [min(t) for t in zip(*times, strict=True)]  # least disturbed by whatever else runs
