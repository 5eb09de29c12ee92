"""The benchmark's peers that only infer, and the blocks in which it times them alone."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnnfast.__main__ import parser
from rnnfast.bench import command, timing
from rnnfast.bench.gate import Gate
from rnnfast.bench.providers import onnx_node
from rnnfast.bench.providers.layer import Layer
from rnnfast.bench.providers.onnx_runtime import OnnxRuntime
from rnnfast.bench.providers.open_vino import OpenVINO
from rnnfast.bench.providers.torch_rnn import TorchRNN
from rnnfast.bench.workload import FORWARD, MODULES, Data, Workload

PEERS = [OnnxRuntime(), OpenVINO()]


@pytest.fixture(autouse=True)
def _small_and_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(timing.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(timing, "QUIET_S", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Noted(TorchRNN):
    """nn.RNN whose forward calls are noted."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def build(self, work: Workload, data: Data) -> Layer:
        layer = super().build(work, data)
        forward = layer.calls[FORWARD]

        def noted() -> object:
            self.calls.append(self.name)
            return forward()

        layer.calls[FORWARD] = noted
        return layer


class Spins(Noted):
    """Infers alone. Its threads spin."""

    def build(self, work: Workload, data: Data) -> Layer:
        layer = super().build(work, data)
        found = {n: v for n, v in layer.results().items() if n in onnx_node.OUTPUTS}
        return Layer({FORWARD: layer.calls[FORWARD]}, lambda: found, own_block=True)


def timed(tmp_path: Path, *providers) -> list[dict[str, str]]:
    fast = ["--seconds-per-workload", "0.001", "--threads", "1", "--out", str(tmp_path)]
    options = parser().parse_args(["bench", "--points", "6,3,5", "--device", "cpu", *fast])
    assert command.run(options, providers) == 0
    with (tmp_path / "cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_peer_whose_threads_spin_is_timed_in_blocks_of_its_own(tmp_path):
    calls: list[str] = []
    found = timed(tmp_path, Spins("s", calls), Noted("a", calls), Noted("b", calls))
    turns = "".join(name for name, before in zip(calls, ["", *calls]) if name != before)
    assert turns.startswith("sab")  # each runs once before anything is timed
    rest = turns.removeprefix("sab")
    assert rest.count("s") == 2
    assert rest.count("a") > 2  # a and b take turns
    assert rest.endswith("s")
    assert {row["what"] for row in found if row["provider"] == "s"} == {FORWARD}
    assert len({row["what"] for row in found if row["provider"] == "a"}) == 3


def test_blocks_stand_between_pauses(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(timing.time, "sleep", lambda s: events.append(f"pause {s:g}"))
    monkeypatch.setattr(timing, "QUIET_S", 7.0)
    calls = {n: lambda n=n: events.append(n) for n in "abxy"}
    samples = timing.in_blocks(calls, {"x", "y"}, 0, rounds=3)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abxy", 6)
    kept = [e for e in events if e in "abxy" or e == "pause 7"]
    order = [e for e, before in zip(kept, ["", *kept]) if e != before]
    blocks = " ".join(order).split("pause 7")
    assert blocks[0] == blocks[-1] == ""
    assert [set(block.split()) for block in blocks[1:-1]] == [{"a", "b"}, {"x"}, {"y"}] * 2
    events.clear()
    timing.in_blocks({n: calls[n] for n in "ab"}, set(), 0, rounds=3)
    assert "pause 7" not in events  # turns alone need no pause


def test_the_gate_judges_outputs_of_a_layer_that_only_infers():
    work = Workload(6, 3, 5, cell="lstm")
    gate = Gate(work)
    layer = Spins("s", []).build(work, gate.data)
    assert gate.complaints(layer) == []
    for name in onnx_node.OUTPUTS:
        wrong = {n: v.clone() for n, v in layer.results().items()}
        wrong[name].view(-1)[-1] *= 1.001
        (complaint,) = gate.complaints(replace(layer, results=lambda w=wrong: w))
        assert complaint.startswith(f"{name}: errs by")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_library_that_is_missing_is_named(peer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peer.unavailable(Workload(6, 3, 5)) == f"{peer.name} is not installed"


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize(
    "special",
    [
        {"precision": "float64"},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"packed": True},
        {"norm": "layer"},
        {"layers": 2},
        {"directions": 2},
        {"device": "cuda"},
    ],
)
def test_only_plain_layers_on_a_cpu_are_compared(peer, special, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert peer.unavailable(Workload(6, 3, 5)) == ""
    assert peer.unavailable(Workload(6, 3, 5, **special)) == "measured on the CPU, plain layers"


def computed(model: tuple[Workload, Data]) -> list:
    """y [T, 1, B, H] and the last states as arrays, from torch's module."""
    work, data = model
    found = TorchRNN().build(work, data).results()
    y, *last = (found[name].detach() for name in onnx_node.OUTPUTS if name in found)
    return [v.numpy() for v in (y.unsqueeze(1), *last)]


class StandIn(types.ModuleType):
    """The part of both libraries that the providers use. The model is a workload and its data."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.asked: dict[str, object] = {}

    class SessionOptions:
        pass

    def InferenceSession(self, model, options, providers):
        self.asked = {**vars(options), "providers": providers}
        return types.SimpleNamespace(run=lambda names, inputs: computed(model))

    def Core(self):
        def compile_model(model, device, settings):
            self.asked = {**settings, "device": device}
            request = types.SimpleNamespace(infer=lambda inputs, **shares: computed(model))
            outputs = computed(model)
            return types.SimpleNamespace(outputs=outputs, create_infer_request=lambda: request)

        return types.SimpleNamespace(read_model=lambda model: model, compile_model=compile_model)


WANTED = {
    "onnxruntime": {
        "intra_op_num_threads": 1,
        "inter_op_num_threads": 1,
        "providers": ["CPUExecutionProvider"],
    },
    "openvino": {
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "device": "CPU",
    },
}


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_stand_in_for_the_library_gets_our_settings_and_passes_the_gate(peer, cell, monkeypatch):
    library = StandIn(peer.name)
    monkeypatch.setitem(sys.modules, peer.name, library)
    monkeypatch.setattr(onnx_node, "model", lambda work, data: (work, data))
    torch.set_num_threads(1)
    work = Workload(6, 3, 5, cell=cell)
    gate = Gate(work)
    layer = peer.build(work, gate.data)
    assert library.asked == WANTED[peer.name]
    assert gate.complaints(layer) == []
    assert (list(layer.calls), layer.own_block) == ([FORWARD], True)


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_library_computes_what_rnnfast_computes(peer, cell):
    pytest.importorskip("onnx")
    pytest.importorskip(peer.package)
    work = Workload(20, 3, 17, cell=cell)
    gate = Gate(work)
    assert gate.complaints(peer.build(work, gate.data)) == []
    swapped = gate.data._replace(weights=dict(gate.data.weights))
    swapped.weights["weight_hh_l0"] = swapped.weights["weight_hh_l0"].flip(0)
    assert any(c.startswith("y: ") for c in gate.complaints(peer.build(work, swapped)))
