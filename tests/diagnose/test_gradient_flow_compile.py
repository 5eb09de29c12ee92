"""torch.compile around a module that records its gradient: one op back, and the eager record."""

from __future__ import annotations

import shutil

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rnnfast
from rnnfast.cells import CELLS
from rnnfast.recurrence import record
from rnnfast.recurrence.groups import Options, Rows, Saved, States, Weights

# torch 2.13 raises these itself; any other warning fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]
B, IN, H = 2, 3, 8

OPTIONS = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "everything": {
        "num_layers": 3,
        "batch_first": True,
        "bidirectional": True,
        "norm": "layer",
        "residual": True,
        "num_heads": 2,
        "track_gradient_flow": "sample",
        "clip_state_grad": 0.1,
        "bptt_window": 2,
    },
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(backend: str, **options) -> rnnfast.RNN:
    torch.manual_seed(0)
    options = {"track_gradient_flow": True, "dtype": torch.float64} | options
    return rnnfast.RNN(IN, H, backend=backend, **options)


def compiled(function, compiler: str = "aot_eager"):
    return torch.compile(function, fullgraph=True, backend=compiler)


def inputs(rnn: rnnfast.RNN, T: int) -> tuple[Tensor, dict[str, Tensor]]:
    """x, and for the module with everything lengths and reset."""
    x = torch.randn((B, T, IN) if rnn.batch_first else (T, B, IN), dtype=torch.float64)
    if not rnn.norm or not rnn.residual:
        return x, {}
    return x, {"lengths": torch.tensor([T, 1]), "reset": torch.arange(B * T).view(B, T) % 3 == 1}


def measured(call, rnn: rnnfast.RNN, x: Tensor, **more) -> dict[str, Tensor]:
    """All gradients and the record of one step."""
    x = x.detach().requires_grad_()
    y, h_n = call(x, **more)
    leaves = {"x": x} | dict(rnn.named_parameters())
    grads = torch.autograd.grad((y**2).sum() + h_n.sum(), list(leaves.values()))
    return dict(zip(leaves, grads)) | rnn.gradient_flow.fields()


def leave_room(rnn: rnnfast.RNN, T: int) -> None:
    """For the record of one layer and direction, in the place of the usual thousands of steps."""
    rnn._records = [[record.make(record.numbers(1, T, 1), torch.device("cpu"))]]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """float64 to rounding: layers in another order of memory are summed in another order."""
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        a = found[name]
        assert a.shape == w.shape, name
        assert torch.equal(a.isnan(), w.isnan()), name
        assert (a - w).nan_to_num().abs().max() <= 1e-12 * w.nan_to_num().abs().max(), name
    assert wanted["state_norm"].nan_to_num().max() > 0


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_and_record_are_those_of_eager(options, compiler, own_backend):
    rnn = make(own_backend, **OPTIONS[options])
    x, more = inputs(rnn, 5)
    wanted = measured(rnn, rnn, x, **more)
    call = compiled(rnn, compiler)
    for _ in range(2):  # as it is compiled, and as it runs
        rnn._records = rnn._new_records()
        assert_same(measured(call, rnn, x, **more), wanted)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tracking", [False, True])
def test_a_layer_goes_back_as_one_op(options, tracking, own_backend):
    """Not as the unrolled formula, which would be compiled again for each T."""
    if own_backend == "reference" and not tracking:
        pytest.skip("there PyTorch differentiates the formula itself")
    rnn = make(own_backend, **OPTIONS[options] | {"track_gradient_flow": tracking})
    x, more = inputs(rnn, 5)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    def compiler(graph, examples):
        return aot_function(graph, fw_compiler=keep, bw_compiler=keep)

    y, _ = compiled(rnn, compiler)(x.requires_grad_(), **more)
    y.sum().backward()
    # An op that writes is the argument of one that makes it functional.
    ops = [[x for n in graph.graph.nodes for x in (n.target, *n.args[:1])] for graph in graphs]
    ours = torch.ops.rnnfast
    forward = ours.rnn.default
    backward = (ours.rnn_backward_recorded if tracking else ours.rnn_backward).default
    counts = [(each.count(forward), each.count(backward)) for each in ops]
    assert counts == [(rnn.num_layers, 0), (0, rnn.num_layers)]


@pytest.mark.proof
@pytest.mark.parametrize("options", OPTIONS)
def test_six_lengths_take_at_most_three_compilations(options, own_backend):
    rnn = make(own_backend, **OPTIONS[options])
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(rnn, counter)
    for T in (6, 9, 12, 20, 7, 11):
        x, more = inputs(rnn, T)
        found = measured(call, rnn, x, **more)
        assert found["state_norm"].shape[2] == T
        assert_same(found, measured(rnn, rnn, x, **more))
    assert 1 <= counter.frame_count <= 3


@pytest.mark.parametrize("compiler", COMPILERS)
def test_more_steps_than_there_is_room_for(compiler, own_backend):
    """A graph cannot make room: it says so, and one eager call does."""
    rnn = make(own_backend)
    leave_room(rnn, 6)
    call = compiled(rnn, compiler)
    (x, _), (longer, _) = inputs(rnn, 6), inputs(rnn, 7)
    measured(call, rnn, x)
    with pytest.raises(RuntimeError, match="cannot make room for the record of so many steps"):
        call(longer)
    wanted = measured(rnn, rnn, longer)
    assert_same(measured(call, rnn, longer), wanted)
    assert measured(call, rnn, x)["state_norm"].shape == (1, 1, 6)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_module_compiles_first_where_it_was_moved_or_copied_to(compiler, own_backend, tmp_path):
    """There is room for the record without an eager call."""
    source = make(own_backend)
    x, _ = inputs(source, 5)
    wanted = measured(source, source, x)
    moved = make(own_backend, device="meta").to_empty(device="cpu")
    moved.load_state_dict(source.state_dict())
    torch.save(source, tmp_path / "rnn")
    for rnn in (moved, torch.load(tmp_path / "rnn", weights_only=False)):
        assert_same(measured(compiled(rnn, compiler), rnn, x), wanted)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("way", ["twice in one loss", "retained", "another in between", "grown"])
def test_the_last_backward_wins(way, compiler, own_backend):
    """A graph holds the record across other graphs that write to it, and where it has grown."""
    rnn = make(own_backend)
    x, _ = inputs(rnn, 5)

    def found(call) -> dict[str, Tensor]:
        leave_room(rnn, 5)
        rnn.zero_grad()
        loss = call(x)[0].square().sum()
        if way == "twice in one loss":
            loss = loss + 3 * call(2 * x)[0].square().sum()
        elif way == "retained":
            loss.backward(retain_graph=True)
        elif way == "another in between":
            (3 * call(2 * x)[0]).square().sum().backward()
        else:
            rnn(torch.cat([x, x]))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in rnn.named_parameters()}
        return grads | rnn.gradient_flow.fields()

    wanted = found(rnn)
    assert_same(found(compiled(rnn, compiler)), wanted)
    alone = measured(rnn, rnn, x)  # in y alone there is no gradient of h_n
    assert not torch.equal(alone["state_norm"], wanted["state_norm"])
    if way != "twice in one loss":
        loss = rnn(x)[0].square().sum()
        loss.backward()
        assert_same(rnn.gradient_flow.fields(), {n: wanted[n] for n in rnn.gradient_flow.fields()})


def test_the_same_module_twice_in_one_graph(own_backend):
    rnn = make(own_backend, norm="layer")
    widen = torch.randn(H, IN, dtype=torch.float64)
    x, _ = inputs(rnn, 5)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return rnn(rnn(x)[0] @ widen)

    wanted = measured(call, rnn, x)
    rnn._records = rnn._new_records()
    assert_same(measured(compiled(call), rnn, x), wanted)


def test_autocast_around_a_compiled_call(own_backend):
    rnn, x = make(own_backend, dtype=torch.float32), torch.randn(5, B, IN)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return rnn(x)

    wanted = measured(call, rnn, x)
    rnn._records = rnn._new_records()
    found = measured(compiled(call), rnn, x)
    assert all(torch.equal(found[name], wanted[name]) for name in rnn.gradient_flow.fields())


@pytest.mark.proof
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_tanh, layer norm", "lstm", "gru"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_opcheck_of_backward_with_a_record(batch_first, cell, per_sample, own_backend):
    """Schema (the record alone is written), shapes and strides, and as AOT traces it."""
    T, D, heads = 5, 2, 2
    name, norm = cell.partition(",")[0], "norm" in cell
    G, has_c = len(CELLS[name].gates), "c" in CELLS[name].states

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x = normal(B, T, IN).transpose(0, 1) if batch_first else normal(T, B, IN)
    w_ih, w_hh = normal(D * G * H, IN), normal(D * G * H, H // heads)
    gamma, beta = normal(2, D * H).unbind() if norm else (None, None)
    states, rows = States(normal(D, B, H)), Rows(torch.tensor([T, 3]))
    states = states._replace(c=normal(D, B, H)) if has_c else states
    rows = rows._replace(reset=torch.arange(T * B).view(T, B) % 4 == 2)
    options = Options(name, D, heads, 1e-5, 2, 0.5, per_sample, all_cells=has_c)
    options = (*options, own_backend)
    weights = Weights(w_ih, *normal(2, D * G * H).unbind(), w_hh, gamma, beta)
    before = (x, *weights, *states, *rows)
    ops = torch.ops.rnnfast
    torch.library.opcheck(ops.rnn.default, (*before, None, *options))
    y, h_n, c_n, values, ahat, rstd, cells = ops.rnn(*before, None, *options)
    saved = Saved(values if G > 1 else None, ahat if norm else None, rstd if norm else None)
    buffer = record.make(record.numbers(D, T, B if per_sample else 1), torch.device("cpu"))
    grads = h_n, c_n if has_c else None, cells if has_c else None
    args = (normal(*y.shape), *grads, x, y, *weights._replace(b_ih=None, b_hh=None))
    args += (*states, *rows, *saved, buffer, True, True, *options)
    torch.library.opcheck(ops.rnn_backward_recorded.default, args)
    gradients = ops.rnn_backward_recorded(*args)
    assert record.read(buffer)[2].isfinite().all()
    fake = ops.rnn_backward_recorded(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    for real, made in zip(gradients, fake, strict=True):
        assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
