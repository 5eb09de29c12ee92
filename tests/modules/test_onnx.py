"""torch.onnx.export(dynamo=True): a layer is one RNN, LSTM or GRU node, which ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from twins import GATES, for_kind, tensors

import rnnfast

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

# torch's exporters warn of themselves, and of axes that two inputs share.
pytestmark = [
    pytest.mark.proof,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]
IN, H = 3, 4
SIZES = ((5, 3), (9, 2), (2, 6), (7, 1))  # T, B; the first is exported


class Model(nn.Module):
    """An RNN with a layer behind it, and named inputs."""

    def __init__(self, rnn: nn.Module, *names: str) -> None:
        super().__init__()
        self.rnn, self.names = rnn, names
        self.after = nn.Linear(H * (1 + bool(rnn.bidirectional)), 2)

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, more))
        if "cx" in named:
            named["hx"] = named["hx"], named.pop("cx")
        y, h_n = self.rnn(x, **named)
        return self.after(y), *tensors(h_n)


def inputs(of: Model, T: int, B: int) -> tuple[Tensor, ...]:
    torch.manual_seed(T)
    rnn = of.rnn
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = 0
    layers = rnn.num_layers * (1 + bool(rnn.bidirectional))
    more = {
        "hx": torch.randn(layers, B, H),
        "cx": torch.randn(layers, B, H),
        "lengths": lengths,
        "reset": torch.rand(T, B) < 0.3,
    }
    return torch.randn(*((B, T) if rnn.batch_first else (T, B)), IN), *(more[n] for n in of.names)


def sizes(of: Model) -> tuple:
    """The dynamic axes of its inputs."""
    T, B = Dim("T", min=2, max=4096), Dim("B", min=1, max=256)
    x = {0: B, 1: T} if of.rnn.batch_first else {0: T, 1: B}
    more = {"hx": {1: B}, "cx": {1: B}, "lengths": {0: B}, "reset": {0: T, 1: B}}
    return x, *([tuple(more[name] for name in of.names)] if of.names else [])


def exported(of: Model, program: bool) -> torch.onnx.ONNXProgram:
    """From the module, or from the program that torch.export has made of it."""
    given, axes = inputs(of, *SIZES[0]), sizes(of)
    if program:
        made = torch.export.export(of, given, dynamic_shapes=axes)
        return torch.onnx.export(made, dynamo=True, verbose=False)
    return torch.onnx.export(of, given, dynamo=True, dynamic_shapes=axes, verbose=False)


def kinds(program: torch.onnx.ONNXProgram) -> list[str]:
    return [node.op_type for node in program.model.graph]


def assert_runs_as(of: nn.Module, program: torch.onnx.ONNXProgram, calls: list, file: Path) -> None:
    program.save(file)
    session = ort.InferenceSession(file)
    names = [value.name for value in session.get_inputs()]
    for given in calls:
        found = session.run(None, {n: v.numpy() for n, v in zip(names, given)})
        for y, wanted in zip(found, of(*given), strict=True):
            assert y.shape == wanted.shape
            assert (torch.from_numpy(y) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("program", [False, True], ids=["module", "program"])
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ()),
        ({"nonlinearity": "relu", "bias": False}, ("hx",)),
        (
            {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
            ("hx", "lengths"),
        ),
        ({"nonlinearity": "sigmoid", "num_layers": 3, "residual": True}, ("lengths",)),
        ({"norm": "batch", "bidirectional": True}, ("lengths",)),
        ({"clip_state_grad": 0.1, "bptt_window": 2, "track_gradient_flow": True}, ()),
    ],
    ids=["plain", "first state", "stacked", "residual", "batch norm", "of backward alone"],
)
def test_onnx_runtime_computes_what_the_module_does(arguments, names, program, kind, tmp_path):
    if kind != "RNN":
        if "norm" in arguments:
            return
        arguments = for_kind(kind, arguments)
    if kind == "LSTM" and "hx" in names:
        names = (*names, "cx")
    of = Model(getattr(rnnfast, kind)(IN, H, **arguments), *names).eval()
    made = exported(of, program)
    assert kinds(made).count(kind) == of.rnn.num_layers
    with torch.no_grad():
        assert_runs_as(of, made, [inputs(of, *size) for size in SIZES], tmp_path / "rnn.onnx")


def test_a_recurrence_without_a_module_is_a_node_too(kind, tmp_path):
    call, G = getattr(rnnfast.functional, kind.lower()), GATES[kind]

    class Recurrence(nn.Module):
        def forward(self, p: Tensor, w_hh: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            y, h_n = call(p, w_hh, **({"b_hn": b} if kind == "GRU" else {}))
            return y, *tensors(h_n)

    of = Recurrence().eval()
    given = torch.randn(5, 3, 2 * G * H), torch.randn(2, G * H, H), torch.randn(2 * H)
    made = torch.onnx.export(of, given, dynamo=True, verbose=False)
    assert kind in kinds(made)
    assert_runs_as(of, made, [given], tmp_path / "rnn.onnx")


def test_unbatched_input_is_exported(tmp_path):
    of, given = Model(rnnfast.RNN(IN, H)).eval(), (torch.randn(5, IN),)
    made = torch.onnx.export(of, given, dynamo=True, verbose=False)
    with torch.no_grad():
        assert_runs_as(of, made, [given], tmp_path / "rnn.onnx")


@pytest.mark.parametrize(
    ("arguments", "names", "said"),
    [
        ({"norm": "layer"}, (), 'norm="layer"'),
        ({"num_heads": 2}, (), "num_heads=2"),
        ({}, ("reset",), "reset"),
        ({"dtype": torch.bfloat16}, (), "torch.bfloat16"),
    ],
)
def test_what_the_node_cannot_express_is_refused_by_name(arguments, names, said, kind):
    if kind != "RNN" and "norm" in arguments:
        return
    module = getattr(rnnfast, kind)(IN, H, **arguments)
    of = Model(module, *names).eval().to(arguments.get("dtype"))
    given = tuple(v.to(of.after.weight.dtype) if v.is_floating_point() else v
                  for v in inputs(of, 5, 3))  # fmt: skip
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as raised:
        torch.onnx.export(of, given, dynamo=True, verbose=False)
    assert f"given rnnfast.{kind} with {said}, wanted" in str(raised.value)
    assert "rnnfast.decompositions()" in str(raised.value)


def test_a_decomposed_program_takes_what_the_node_cannot(kind, tmp_path):
    norm = {"norm": "layer"} if kind == "RNN" else {}
    of = Model(getattr(rnnfast, kind)(IN, H, num_heads=2, **norm), "reset").eval()
    given = inputs(of, 5, 3)
    table = torch.export.default_decompositions()
    table.update(rnnfast.decompositions())
    program = torch.export.export(of, given).run_decompositions(table)
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    with torch.no_grad():
        assert_runs_as(of, made, [given], tmp_path / "rnn.onnx")


def test_cell_states_are_refused_by_name():
    of = Model(rnnfast.LSTM(IN, H)).eval()
    of.rnn.return_cell_states = True
    of.forward = lambda x: of.rnn(x)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as raised:
        torch.onnx.export(of, (torch.randn(5, 3, IN),), dynamo=True, verbose=False)
    assert "given rnnfast.LSTM with return_cell_states, wanted" in str(raised.value)


def test_the_old_exporter_is_refused_with_the_way_out(tmp_path):
    of, given = Model(rnnfast.RNN(IN, H)).eval(), (torch.randn(5, 3, IN),)
    with pytest.raises(RuntimeError, match=r"wanted dynamo=True .*rnnfast\.to_torch\(model\)"):
        torch.onnx.export(of, given, str(tmp_path / "rnn.onnx"), dynamo=False)


def test_a_layer_computes_as_before_after_an_export():
    of = Model(rnnfast.RNN(IN, H)).eval()
    given = (torch.randn(5, 3, IN),)
    wanted = of(*given)[0]
    torch.onnx.export(of, given, dynamo=True, verbose=False)
    assert torch.equal(of(*given)[0], wanted)
