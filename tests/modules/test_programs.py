"""Programs made of a module: torch.export, torch.jit.trace and torch.fx; and torch.jit.script."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast.recurrence import record

# torch raises these itself, also for sizes that nn.RNN's own checks look at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # export.load of 2.11
]
IN, H = 3, 4


class Model(nn.Module):
    """An RNN with something to train before and behind it."""

    def __init__(self, rnn: nn.Module, *names: str) -> None:
        super().__init__()
        self.before, self.rnn, self.names = nn.Linear(IN, IN), rnn, names
        self.after = nn.Linear(H * (1 + bool(rnn.bidirectional)), 2)

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n = self.rnn(self.before(x), **dict(zip(self.names, more)))
        return self.after(y), h_n


OPTIONS = {
    "plain": ({}, ()),
    "first state": ({"nonlinearity": "relu", "bias": False}, ("hx",)),
    "stacked": (
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
        ("hx", "lengths", "reset"),
    ),
    "layer norm": ({"norm": "layer", "num_heads": 2, "nonlinearity": "sigmoid"}, ("reset",)),
    "batch norm": ({"norm": "batch"}, ("lengths",)),
    "limits": ({"clip_state_grad": 0.1, "bptt_window": 2, "num_layers": 3, "residual": True}, ()),
}


def model(backend: str, options: str = "plain", **more) -> Model:
    torch.manual_seed(0)
    arguments, names = OPTIONS[options]
    return Model(rnnfast.RNN(IN, H, backend=backend, **(arguments | more)), *names)


def inputs(of: Model, T: int, B: int) -> tuple[Tensor, ...]:
    torch.manual_seed(T)
    rnn = of.rnn
    two = (B, T) if rnn.batch_first else (T, B)
    more = {
        "hx": torch.randn(rnn.num_layers * (1 + bool(rnn.bidirectional)), B, H),
        "lengths": torch.randint(0, T + 1, (B,)),
        "reset": torch.rand(two) < 0.3,
    }
    return torch.randn(*two, IN), *(more[name] for name in of.names)


def exported(of: Model, strict: bool = False) -> torch.export.ExportedProgram:
    T, B = Dim("T", min=2, max=4096), Dim("B", min=2, max=256)
    two = {0: B, 1: T} if of.rnn.batch_first else {0: T, 1: B}
    sizes = {"hx": {1: B}, "lengths": {0: B}, "reset": two}
    shapes = {"x": two} | ({"more": tuple(sizes[n] for n in of.names)} if of.names else {})
    return torch.export.export(of, inputs(of, 5, 3), dynamic_shapes=shapes, strict=strict)


def saved(of: Model) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(exported(of), file)
    file.seek(0)
    return torch.export.load(file).module()


def traced(of: Model) -> nn.Module:
    random = of.training and (of.rnn.dropout or of.rnn.norm == "batch")
    return torch.jit.trace(of, inputs(of, 5, 3), check_trace=not random)


def traced_without_gradients(of: Model) -> nn.Module:
    with torch.no_grad():
        return traced(of)


def trace_saved(of: Model) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(traced(of), file)
    file.seek(0)
    return torch.jit.load(file)


WAYS: dict[str, Callable[[Model], nn.Module]] = {
    "exported": lambda of: exported(of).module(),
    "exported strictly": lambda of: exported(of, strict=True).module(),
    "decomposed": lambda of: exported(of).run_decompositions().module(),
    "saved": saved,
    "traced": traced,
    "traced without gradients": traced_without_gradients,
    "trace saved": trace_saved,
}
# As `make test` has them; the others are for `make prove`.
QUICK = ("exported", "traced")
EVERY_WAY = [pytest.param(w, marks=[] if w in QUICK else [pytest.mark.proof]) for w in WAYS]
HERE = [way for way in WAYS if "saved" not in way]


def results(call: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and parameters, and what is left in the buffers."""
    torch.manual_seed(1)
    given = tuple(v.detach().clone() for v in given)
    leaves = {str(i): v.requires_grad_() for i, v in enumerate(given) if v.is_floating_point()}
    leaves |= dict(call.named_parameters())
    y, h_n = call(*given)
    grads = torch.autograd.grad((y**2).sum() + h_n.sum(), list(leaves.values()))
    buffers = {f"buffer {name}": x.clone() for name, x in call.named_buffers()}
    return {"y": y, "h_n": h_n} | dict(zip(leaves, grads)) | buffers


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() >= wanted.keys()
    for name, w in wanted.items():
        assert found[name].shape == w.shape, name
        assert torch.allclose(found[name], w, atol=atol, equal_nan=True), name


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_program_trains_as_its_module_does_at_every_size(way, options, own_backend):
    of = model(own_backend, options)
    start = {name: x.clone() for name, x in of.state_dict().items()}
    program = WAYS[way](of)
    for T, B in ((5, 3), (9, 2), (2, 6)):
        given = inputs(of, T, B)
        of.load_state_dict(start)
        wanted = results(of, given)
        of.load_state_dict(start)
        program.load_state_dict(start)
        assert_same(results(program, given), wanted)


@pytest.mark.parametrize("way", ["exported", "traced"])
def test_a_program_steps_with_an_optimizer(way, own_backend):
    of = model(own_backend)
    program, given = WAYS[way](of), inputs(of, 6, 3)
    losses = []
    optimizer = torch.optim.SGD(program.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss = program(*given)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("way", ["exported", "traced"])
def test_second_derivatives_and_transforms_of_a_program_are_those_of_its_module(way, own_backend):
    of = model(own_backend, num_layers=2)
    program, (x,) = WAYS[way](of), inputs(of, 5, 3)

    def loss(call) -> Callable[[Tensor], Tensor]:
        return lambda x: call(x)[0].square().sum()

    def second(call) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(call)(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    for of_call in (
        second,
        lambda call: torch.func.grad(loss(call))(x),
        lambda call: torch.func.jvp(loss(call), (x,), (x,))[1],
        lambda call: torch.func.hessian(loss(call))(x),
        lambda call: torch.vmap(torch.func.grad(loss(call)))(torch.stack([x, 2 * x])),
    ):
        found, wanted = of_call(program), of_call(of)
        assert wanted.count_nonzero()
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_compiled_program_trains(own_backend):
    torch._dynamo.reset()
    of = model(own_backend, "layer norm")
    program, given = exported(of).module(), inputs(of, 9, 2)
    wanted = results(of, given)
    compiled = torch.compile(program, backend="aot_eager")
    torch.manual_seed(1)
    y, h_n = compiled(*given)
    loss = (y**2).sum() + h_n.sum()
    grads = torch.autograd.grad(loss, list(program.parameters()))
    assert_same(dict(zip(dict(program.named_parameters()), grads)), {
        name: wanted[name] for name, _ in of.named_parameters()
    })  # fmt: skip


def test_make_fx_records_forward_and_backward_as_ops():
    of = model("reference", "layer norm", track_gradient_flow=False)
    given = inputs(of, 5, 3)

    def gradients(*given: Tensor) -> list[Tensor]:
        y, h_n = of(*given)
        return torch.autograd.grad((y**2).sum() + h_n.sum(), list(of.parameters()))

    wanted = gradients(*given)
    graph = make_fx(gradients)(*given)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(graph(*given), wanted))


def test_a_program_of_the_functional_trains(own_backend):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, H, H) / 2)

        def forward(self, p, lengths):
            return rnnfast.functional.rnn(p, self.w, lengths=lengths, backend=own_backend)

    of = Functional()
    example = torch.randn(5, 3, 2 * H), torch.tensor([5, 0, 2])
    sizes = {"p": {0: Dim("T", min=2), 1: Dim("B", min=2)}, "lengths": {0: Dim("B", min=2)}}
    given = torch.randn(9, 4, 2 * H), torch.tensor([9, 0, 7, 1])
    wanted = results(of, given)
    assert_same(results(torch.jit.trace(of, example), given), wanted)
    program = torch.export.export(of, example, dynamic_shapes=sizes).module()
    assert_same(results(program, given), wanted)


@pytest.mark.parametrize("way", ["exported", "traced"])
def test_autocast_inside_a_program(way, own_backend):
    class Narrow(Model):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    of = Narrow(rnnfast.RNN(IN, H, backend=own_backend))
    given = inputs(of, 9, 2)
    found, wanted = results(WAYS[way](of), given), results(of, given)
    assert found["y"].dtype == torch.bfloat16
    assert_same(found, wanted, atol=0.05)  # PyTorch's gradient of the reference rounds elsewhere


@pytest.mark.parametrize("way", ["exported", "traced"])
def test_a_program_refuses_a_sequence_without_steps(way, own_backend):
    of = model(own_backend)
    if way == "exported":
        program = torch.export.export(
            of, inputs(of, 5, 3), dynamic_shapes={"x": {0: Dim("T", min=0, max=9)}}
        ).module()
    else:
        program = traced(of)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        program(torch.randn(0, 3, IN))


# ----------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("tracking", [True, "sample"])
@pytest.mark.parametrize("way", HERE)
def test_the_record_of_a_program_is_read_from_its_module(way, tracking, own_backend):
    """Each layer has its own record, though they are equal constants as the program is made."""
    of = model(own_backend, track_gradient_flow=tracking, num_layers=2)
    program = WAYS[way](of)
    for T, B in ((5, 3), (9, 2)):
        given = inputs(of, T, B)
        results(of, given)
        wanted = of.rnn.gradient_flow.fields()
        of.rnn._records[0][-1][0] = record.NEVER
        of.rnn._records[1][-1][0] = record.NEVER
        results(program, given)
        assert_same(of.rnn.gradient_flow.fields(), wanted)


@pytest.mark.parametrize("way", HERE)
def test_a_program_without_room_for_its_record_says_what_to_do(way, own_backend):
    of = model(own_backend, track_gradient_flow=True)
    of.rnn._records = [[record.make(record.numbers(1, 6, 1), torch.device("cpu"))]]
    program = WAYS[way](of)
    results(program, inputs(of, 6, 3))
    with pytest.raises(RuntimeError, match=r"given 7 points, .* has room to record 6; before you"):
        results(program, inputs(of, 7, 3))
    results(of, inputs(of, 7, 3))  # as it says
    results(WAYS[way](of), inputs(of, 7, 3))


# ------------------------------------------------------------------------------- packed batches


class Packs(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h_n = self.rnn(packed)
        return pad_packed_sequence(y)[0], h_n


def test_a_trace_that_packs_takes_other_lengths_and_batches(backend):
    of = Packs(rnnfast.RNN(IN, H, 2, bidirectional=True, backend=backend))
    program = torch.jit.trace(of, (torch.randn(5, 3, IN), torch.tensor([5, 2, 3])))
    given = torch.randn(9, 4, IN), torch.tensor([1, 9, 4, 9])
    assert_same(results(program, given), results(of, given))


def test_a_trace_takes_other_lengths_on_every_backend(backend):
    of = Model(rnnfast.RNN(IN, H, backend=backend), "lengths")
    program = traced(of)
    given = torch.randn(9, 4, IN), torch.tensor([0, 9, 4, 2])
    assert_same(results(program, given), results(of, given))


def test_an_export_that_packs_is_refused_and_told_of_lengths(backend):
    of = Packs(rnnfast.RNN(IN, H, backend=backend))
    with pytest.raises(
        RuntimeError, match=r"PackedSequence depend on .* padded input with lengths"
    ):
        torch.export.export(of, (torch.randn(5, 3, IN), torch.tensor([5, 2, 3])))


# ------------------------------------------------------------------------------------ what shows


def test_tensorboard_draws_the_graph_of_a_model(own_backend, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(model(own_backend), torch.randn(5, 3, IN))
    assert b"rnnfast::rnn" in b"".join(path.read_bytes() for path in tmp_path.iterdir())


TRACES = """
import torch, rnnfast

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = rnnfast.RNN(4, 4, 3, residual=True)

    def forward(self, x, lengths, reset):
        return self.rnn(x, lengths=lengths, reset=reset)

torch.jit.trace(Model(), (torch.ones(5, 2, 4), torch.tensor([5, 2]), torch.ones(5, 2) == 0))
"""


def test_tracing_warns_of_nothing_in_this_package():
    """As torch is silent about its own modules."""
    done = subprocess.run(
        [sys.executable, "-c", TRACES], capture_output=True, text=True, check=True
    )
    assert "TracerWarning" not in done.stderr


# ------------------------------------------------------------------------------------- torch.fx


@pytest.mark.parametrize("options", OPTIONS)
def test_fx_takes_an_rnn_for_one_node(options, own_backend):
    of = model(own_backend, options)

    class Fixed(nn.Module):
        """As many arguments as there are: torch.fx takes no star."""

        def __init__(self):
            super().__init__()
            self.of = of

        forward = {
            1: lambda self, a: self.of(a),
            2: lambda self, a, b: self.of(a, b),
            4: lambda self, a, b, c, d: self.of(a, b, c, d),
        }[1 + len(of.names)]

    whole, given = Fixed(), inputs(of, 5, 3)
    start = {name: x.clone() for name, x in of.state_dict().items()}
    graph = fx.symbolic_trace(whole)
    assert [n.op for n in graph.graph.nodes if n.target == "of.rnn"] == ["call_module"]
    wanted = results(whole, given)
    of.load_state_dict(start)
    assert_same(results(graph, given), wanted)


def test_fx_takes_the_functional_for_one_node(own_backend):
    def twice(p, w):
        return 2 * rnnfast.functional.rnn(p, w, backend=own_backend)[0]

    p, w = torch.randn(5, 3, H), torch.randn(H, H)
    graph = fx.symbolic_trace(twice)
    assert torch.equal(graph(p, w), twice(p, w))


class Doubled(rnnfast.RNN):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("rnn", [rnnfast.RNN(IN, H), nn.Sequential(Doubled(IN, H))])
def test_fx_into_an_rnn_is_refused_and_told_of_a_leaf(rnn):
    with pytest.raises(fx.proxy.TraceError, match=r"cannot trace into .* is_leaf_module"):
        fx.symbolic_trace(rnn)


def test_a_tracer_with_the_rnn_as_a_leaf():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, rnnfast.RNN) or super().is_leaf_module(module, name)

    root, x = nn.Sequential(Doubled(IN, H)), torch.randn(5, 3, IN)
    graph = fx.GraphModule(root, Tracer().trace(root))
    assert torch.equal(graph(x)[0], root(x)[0])


@pytest.mark.parametrize("given", [[1.0], None])
def test_the_functional_refuses_what_is_no_tensor_by_its_name(given):
    with pytest.raises(TypeError, match=r"p: given .*, wanted a Tensor"):
        rnnfast.functional.rnn(given, torch.eye(H))


# --------------------------------------------------------------------------------- torch.jit.script


@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"track_gradient_flow": True}])
def test_script_is_refused_and_told_of_to_torch(options):
    for module in (rnnfast.RNN(IN, H, **options), nn.Sequential(rnnfast.RNN(IN, H, **options))):
        with pytest.raises(RuntimeError, match=r"torch.jit.script: .* rnnfast.to_torch\(model\)"):
            torch.jit.script(module)


def test_script_of_the_functional_is_refused_by_its_name():
    class Functional(nn.Module):
        def forward(self, p: Tensor, w: Tensor):
            return rnnfast.functional.rnn(p, w)

    with pytest.raises(RuntimeError, match=r"cannot compile rnnfast\.functional\.rnn"):
        torch.jit.script(Functional())


def test_script_takes_what_to_torch_makes_and_what_was_traced():
    of, x = nn.Sequential(rnnfast.RNN(IN, H)), torch.randn(5, 3, IN)
    wanted = of(x)[0]
    traced_part = nn.Sequential(torch.jit.trace(of, x))
    assert torch.equal(torch.jit.script(traced_part)(x)[0], wanted)
    scripted = torch.jit.script(rnnfast.to_torch(of, report=None))
    assert torch.allclose(scripted(x)[0], wanted, atol=1e-6)
