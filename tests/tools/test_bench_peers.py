"""Peers of the benchmark that compute forward alone, and the blocks in which they are timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rnnfast.bench import timing
from rnnfast.bench.gate import Gate, shortened
from rnnfast.bench.providers import ALONE, PROVIDERS, onnx_model
from rnnfast.bench.providers.layer import Layer
from rnnfast.bench.providers.onnx_runtime import OnnxRuntime
from rnnfast.bench.providers.open_vino import OpenVino
from rnnfast.bench.providers.torch_rnn import TorchRNN
from rnnfast.bench.runner import Runner
from rnnfast.bench.workload import BOTH, FORWARD, MODULES, Data, Workload

SMALL = Workload(6, 3, 8)
RUNTIMES = [OnnxRuntime(), OpenVino()]


class ForwardOnly(TorchRNN):
    """nn.RNN whose y is ``off``."""

    name = "onnxruntime"  # one of ALONE

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def build(self, work: Workload, data: Data) -> Layer:
        layer = super().build(work, data)
        found = {n: layer.results()[n] for n in ("y", "h_n")}
        found["y"] += self.off
        return Layer({FORWARD: layer.calls[FORWARD]}, lambda: found)


def test_a_candidate_with_threads_that_spin_is_timed_in_blocks_of_its_own():
    seen: list[str] = []
    calls: dict[str, Callable] = {n: lambda n=n: seen.append(n) for n in ("a", "spins", "b")}
    samples = timing.take_blocks(calls, {"spins"}, 0.01, 6, timing.HostClock())
    runs = [name for name, before in zip(seen, [None, *seen]) if name != before]
    alone = [i for i, name in enumerate(runs) if name == "spins"]
    assert len(alone) == 2  # two blocks, however often a and b alternate
    assert alone[0] > 1
    assert alone[1] - alone[0] > 2
    assert all(len(found) >= 6 for found in samples.values())


def test_without_such_a_candidate_all_take_turns():
    calls: dict[str, Callable] = {n: lambda: None for n in ("a", "b")}
    samples = timing.take_blocks(calls, ALONE, 0.0, 4, timing.HostClock())
    assert {n: len(found) >= 3 for n, found in samples.items()} == {"a": True, "b": True}


def test_a_provider_of_forward_alone_is_judged_and_timed_by_it():
    runner = Runner([TorchRNN(), ForwardOnly()], 0.01, 3)
    found = runner.measure([SMALL])
    assert runner.failures == []
    assert {r.what for r in found if r.provider == "onnxruntime"} == {FORWARD}
    assert BOTH in {r.what for r in found if r.provider == "torch"}
    wrong = Runner([ForwardOnly(off=0.1)], 0.01, 3)
    assert wrong.measure([SMALL]) == []
    (failure,) = wrong.failures
    assert "wrong results, so no time. y: errs by 0.1" in failure


def test_providers_that_are_timed_alone_exist():
    assert {provider.name for provider in PROVIDERS} >= ALONE


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.name)
def test_a_runtime_refuses_what_it_does_not_compute(runtime, monkeypatch):
    assert onnx_model.refusal(Workload(6, 3, 8, precision="float64"))
    assert onnx_model.refusal(Workload(6, 3, 8, packed=True))
    assert onnx_model.refusal(SMALL) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert runtime.unavailable(SMALL) == "onnx is not installed"


@pytest.mark.proof
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.name)
def test_a_runtime_computes_the_layer(runtime, cell):
    work = Workload(6, 3, 8, cell=cell)
    if why := runtime.unavailable(work):
        pytest.skip(why)
    gate = Gate(shortened(work))
    assert gate.complaints(runtime.build(shortened(work), gate.data)) == []
