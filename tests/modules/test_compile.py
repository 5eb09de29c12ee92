"""torch.compile without graph breaks, torch.export, and the two ops as torch checks them."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence
from twins import outputs, start, tensors

import rnnfast
from rnnfast.backends import cpu
from rnnfast.cells import CELLS
from rnnfast.recurrence.groups import Options, Rows, States, Weights
from rnnfast.recurrence.precision import arithmetic

# torch 2.13 raises these itself; any other warning fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference", "torch"]
IN, H = 3, 4


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(backend: str = "cpu", kind: str = "RNN", **options) -> nn.RNNBase:
    torch.manual_seed(0)
    return getattr(rnnfast, kind)(IN, H, backend=backend, **options)


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def results(call, module: nn.Module, x: Tensor, hx=None, **options) -> list[Tensor]:
    """Outputs, and gradients of all inputs and parameters."""
    x, *states = (a.detach().requires_grad_() for a in (x, *tensors(hx)))
    given = [x] if hx is None else [x, tuple(states) if len(states) > 1 else states[0]]
    y, *others = found = outputs(call, *given, **options)
    loss = (y**2).sum() + sum(v.sum() for v in others)
    grads = torch.autograd.grad(loss, [x, *states, *module.parameters()])
    return [*(v.detach() for v in found), *grads]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, w in zip(found, wanted, strict=True):
        assert a.stride() == w.stride()
        assert torch.equal(a, w)


OPTIONS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "residual": {"num_layers": 3, "residual": True, "nonlinearity": "sigmoid"},
    "no bias": {"bias": False, "nonlinearity": "relu"},
    "LSTM": {"kind": "LSTM", "return_cell_states": True},
    "LSTM stacked": {"kind": "LSTM", "num_layers": 2, "bidirectional": True, "num_heads": 2},
    "GRU": {"kind": "GRU"},
    "GRU stacked": {"kind": "GRU", "num_layers": 2, "bidirectional": True, "batch_first": True},
}
RARE = ("LSTM stacked", "GRU", "GRU stacked")  # `make prove` has these
SOME = ["plain", "stacked", "LSTM", "LSTM stacked", "GRU", "GRU stacked"]


def some(names: list[str]) -> pytest.MarkDecorator:
    marks = [pytest.mark.proof if name in RARE else [] for name in names]
    return pytest.mark.parametrize(
        "options", [pytest.param(name, marks=mark) for name, mark in zip(names, marks)]
    )


every_kind = pytest.mark.parametrize(
    "kind", ["RNN", *(pytest.param(k, marks=pytest.mark.proof) for k in ("LSTM", "GRU"))]
)


@pytest.mark.proof
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_strides_are_those_of_torch(batch_first, backend):
    rnn = layer(backend, num_layers=2, batch_first=batch_first)
    old, call = nn.RNN(IN, H, 2, batch_first=batch_first), compiled(rnn)
    for x in (torch.randn(3, 5, IN), torch.randn(5, 3, IN).transpose(0, 1)):
        for found, wanted in zip(call(x), old(x)):
            assert found.stride() == wanted.stride()


@needs_cpu
@some(list(OPTIONS))
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_results_and_gradients_equal_eager_ones(compiler, options):
    rnn = layer(**OPTIONS[options])
    x, states = torch.randn(5, 2, IN), rnn.num_layers * (1 + bool(rnn.bidirectional))
    h_0 = torch.randn(states, x.shape[0 if rnn.batch_first else 1], H)
    hx = start(OPTIONS[options].get("kind", "RNN"), h_0)
    call = compiled(rnn, compiler)
    assert_equal(results(call, rnn, x, hx), results(rnn, rnn, x, hx))
    assert_equal(results(call, rnn, x), results(rnn, rnn, x))  # hx absent
    unbatched = x[:, 0]
    assert_equal(results(call, rnn, unbatched), results(rnn, rnn, unbatched))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_compiles_without_a_break(backend, kind):
    rnn, x = layer(backend, kind, dtype=torch.float64), torch.randn(5, 2, IN, dtype=torch.float64)
    found, wanted = results(compiled(rnn), rnn, x), results(rnn, rnn, x)
    for a, w in zip(found, wanted, strict=True):  # torch decomposes its own kernels
        assert (a - w).abs().max() <= 1e-13 * w.abs().max()


@pytest.mark.proof
@needs_cpu
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_six_sizes_take_at_most_three_compilations(compiler, options, with_lengths):
    rnn = layer(**OPTIONS[options])
    counter = CompileCounterWithBackend(compiler)
    call = compiled(rnn, counter)
    for T, B in [(6, 2), (9, 2), (12, 3), (20, 4), (7, 5), (11, 2)]:
        x = torch.randn((B, T, IN) if rnn.batch_first else (T, B, IN))
        kwargs = {"lengths": torch.randint(0, T + 1, (B,))} if with_lengths else {}
        assert_equal(results(call, rnn, x, **kwargs), results(rnn, rnn, x, **kwargs))
    assert 1 <= counter.frame_count <= 3


@needs_cpu
@every_kind
def test_lengths_may_be_a_tensor_or_a_list(kind):
    rnn, x = layer(kind=kind, bidirectional=True), torch.randn(5, 3, IN)
    call = compiled(rnn)
    for lengths in (torch.tensor([5, 0, 2]), torch.tensor([1, 3, 5]), [4, 0, 5]):
        wanted = results(rnn, rnn, x, lengths=lengths)
        assert_equal(results(call, rnn, x, lengths=lengths), wanted)


@needs_cpu
def test_lengths_out_of_range_never_reach_a_kernel():
    """Their values are not seen in a graph: they are clamped, as on a GPU."""
    rnn, x = layer(bidirectional=True), torch.randn(5, 3, IN)
    found = results(compiled(rnn), rnn, x, lengths=torch.tensor([9, -4, 5]))
    assert_equal(found, results(rnn, rnn, x, lengths=[5, 0, 5]))


def assert_dropout_works(rnn: rnnfast.RNN, call) -> None:
    x = torch.randn(5, 2, IN)
    torch.manual_seed(1)
    first, second = call(x)[0], call(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(x)[0], first)
    rnn.eval()
    assert torch.equal(call(x)[0], call(x)[0])
    assert torch.equal(call(x)[0], rnn(x)[0])
    rnn.train()
    assert not torch.equal(call(x)[0], call(x)[0])


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dropout_is_random_in_training_and_absent_in_evaluation(compiler, backend):
    """torch itself loses it: its decomposition never drops anything."""
    rnn = layer(backend, num_layers=2, dropout=0.5)
    assert_dropout_works(rnn, compiled(rnn, compiler))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_and_around_a_compiled_call(dtype):
    rnn, x = layer(), torch.randn(5, 2, IN)

    def inside(*args):
        with torch.autocast("cpu", dtype):
            return rnn(*args)

    wanted = results(inside, rnn, x)
    assert wanted[0].dtype == dtype
    assert wanted[3].dtype == torch.float32
    assert_equal(results(compiled(inside), rnn, x), wanted)
    call = compiled(rnn)
    with torch.autocast("cpu", dtype):
        y, h_n = call(x)
    assert_equal([y, h_n], wanted[:2])


@pytest.mark.proof
@needs_cpu
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_transforms_inside_a_compiled_function(transform, kind):
    rnn, x = layer(kind=kind), torch.randn(5, 2, IN)
    functions = {
        "grad": torch.func.grad(lambda x: rnn(x)[0].square().sum()),
        "vmap": torch.vmap(lambda x: rnn(x)[0], 1, 1),
        "jvp": lambda x: torch.func.jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))[1],
        "jacrev": torch.func.jacrev(lambda x: rnn(x)[0]),
    }
    wanted = functions[transform](x)
    assert wanted.count_nonzero()
    assert torch.equal(compiled(functions[transform])(x), wanted)


@needs_cpu
def test_a_training_step_compiles_around_the_module():
    """Forward, loss and a second module in one graph; weights change between calls."""
    model = nn.ModuleList([layer(), nn.Linear(H, 2)])

    def loss(x: Tensor) -> Tensor:
        return model[1](model[0](x)[0]).square().mean()

    x, call = torch.randn(5, 2, IN), compiled(loss)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        wanted = torch.autograd.grad(loss(x), list(model.parameters()))
        optimizer.zero_grad()
        call(x).backward()
        assert_equal([p.grad for p in model.parameters()], list(wanted))
        optimizer.step()


@needs_cpu
@every_kind
def test_a_second_derivative_of_a_compiled_module_is_refused(kind):
    """By torch, and not computed wrongly."""
    rnn = layer(kind=kind)
    x = torch.randn(5, 2, IN, requires_grad=True)
    loss = compiled(rnn)(x)[0].square().sum()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)


@pytest.mark.proof
@needs_cpu
@needs_compiler
def test_inductor():
    rnn = layer(num_layers=2, batch_first=True, bidirectional=True, dropout=0.5)
    call = compiled(rnn, "inductor")
    assert_dropout_works(rnn, call)
    rnn.eval()
    x = torch.randn(2, 5, IN)
    found, wanted = results(call, rnn, x), results(rnn, rnn, x)
    assert torch.equal(found[0], wanted[0])
    u = torch.finfo(x.dtype).eps / 2  # T * B terms are added in another order on either side
    for a, w in zip(found, wanted, strict=True):
        assert (a - w).norm() <= 2 * 10 * u * w.norm()


# ---------------------------------------------------------- what a graph cannot have the sizes of


class Packs(nn.Module):
    def __init__(self, rnn: rnnfast.RNN) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return y.data, h_n


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
# dynamo looks at the gradient of what comes out of the break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_packed_batch_breaks_the_graph_around_the_rnn(compiler, backend):
    model = Packs(layer(backend, num_layers=2, bidirectional=True))
    call = torch.compile(model, backend=compiler)
    for T, B in [(6, 3), (9, 2), (4, 5)]:
        x, lengths = torch.randn(T, B, IN), torch.randint(1, T + 1, (B,))
        found = results(call, model, x, lengths=lengths)
        assert_equal(found, results(model, model, x, lengths=lengths))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_batch_is_refused_in_a_full_graph_and_told_of_lengths(backend):
    packed = pack_padded_sequence(torch.randn(5, 2, IN), [5, 2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="padded input with lengths"):
        compiled(layer(backend))(packed)


# dynamo looks at the gradient of what comes out of the break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_lengths_for_the_kernels_of_torch_break_the_graph_around_them():
    rnn, lengths = layer("torch", batch_first=True), torch.tensor([0, 5, 3])
    call = torch.compile(rnn, backend="eager")
    x = torch.randn(3, 5, IN)
    found = results(call, rnn, x, lengths=lengths)
    assert_equal(found, results(rnn, rnn, x, lengths=lengths))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the other backends take lengths"):
        compiled(rnn)(x, lengths=lengths)


# -------------------------------------------------------------------------------------- export


@needs_cpu
@pytest.mark.parametrize("strict", [False, True])
@some(SOME)
def test_an_exported_program_runs_at_other_sizes(strict, options):
    rnn = layer(**OPTIONS[options]).eval()
    T, B = Dim("T", min=2, max=4096), Dim("B", min=2, max=256)
    sizes = {0: B, 1: T} if rnn.batch_first else {0: T, 1: B}
    program = torch.export.export(
        rnn, (torch.randn(5, 6, IN),), dynamic_shapes={"input": sizes}, strict=strict
    )
    program = program.run_decompositions()
    assert any(node.target is torch.ops.rnnfast.rnn.default for node in program.graph.nodes)
    for shape in [(5, 6), (2, 3), (40, 7), (3, 64)]:
        x = torch.randn(*shape, IN)
        assert_equal(outputs(program.module(), x), outputs(rnn, x))


@needs_cpu
@every_kind
def test_an_exported_program_takes_lengths(kind):
    rnn = layer(kind=kind, bidirectional=True).eval()
    T, B = Dim("T", min=2, max=4096), Dim("B", min=2, max=256)
    program = torch.export.export(
        rnn,
        (torch.randn(5, 2, IN),),
        {"lengths": torch.tensor([5, 2])},
        dynamic_shapes={"input": {0: T, 1: B}, "lengths": {0: B}},
    )
    x, lengths = torch.randn(9, 3, IN), torch.tensor([9, 0, 4])
    assert_equal(outputs(program.module(), x, lengths=lengths), outputs(rnn, x, lengths=lengths))


# ----------------------------------------------------------------------------------- the two ops


def op_inputs(
    dtype=torch.float32,
    D=2,
    h_0=True,
    lengths=False,
    batch_first=False,
    w_ih="biased",
    norm=False,
    **options,
) -> tuple:
    """w_ih: "biased", "unbiased", or None for an input that is the projection."""
    T, B = 5, 3
    cell = CELLS[options.get("cell", "rnn_tanh")]
    rows = D * len(cell.gates) * H
    width = IN if w_ih else rows
    x = torch.randn(B, T, width).transpose(0, 1) if batch_first else torch.randn(T, B, width)
    biased = w_ih == "biased"
    w_ih = torch.randn(rows, IN) if w_ih else None
    b_ih, b_hh = torch.randn(2, rows) if biased else (None, None)
    w_hh = torch.randn(rows, H)
    starts = [torch.randn(D, B, H) if h_0 else None for _ in cell.states]
    x, w_ih, b_ih, b_hh, w_hh, *starts = (
        v if v is None else v.to(dtype) for v in (x, w_ih, b_ih, b_hh, w_hh, *starts)
    )
    gamma, beta = torch.randn(2, D * H).to(arithmetic(dtype)) if norm else (None, None)
    reset = torch.rand(T, B) < 0.3 if norm else None
    n = torch.tensor([5, 0, 3]) if lengths else None
    weights, states = Weights(w_ih, b_ih, b_hh, w_hh, gamma, beta), States(*starts)
    return (x, *weights, *states, *Rows(n, reset), None, *Options(directions=D, **options))


def groups(inputs: tuple) -> tuple[torch.Tensor, Weights, States, Rows, Options]:
    """The arguments of the op ``rnn``, without the biases, which backward does not read."""
    x, *rest = inputs
    weights, states, rows = Weights(*rest[:7]), States(*rest[7:9]), Rows(*rest[9:11])
    return x, weights._replace(b_ih=None, b_hh=None), states, rows, Options(*rest[12:])


def present(saved: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """An op has an empty tensor in the place of a value that is not there."""
    return [value if value.numel() else None for value in saved]


CASES = [
    {},
    {"dtype": torch.float64, "D": 1},
    {"dtype": torch.bfloat16, "lengths": True},
    {"h_0": False, "batch_first": True},
    {"D": 1, "w_ih": None},
    {"w_ih": "unbiased", "lengths": True, "batch_first": True},
    {"norm": True, "batch_first": True, "bptt_window": 2, "clip_state_grad": 0.5},
    {"norm": True, "dtype": torch.bfloat16, "lengths": True},
    {"cell": "lstm", "lengths": True, "all_cells": True},
    {"cell": "gru", "D": 1, "w_ih": None, "clip_state_grad": 0.5},
    {"cell": "lstm", "saves": False, "h_0": False},
]
# `make test` runs one case of the oracle and two of the kernels, `make prove` all.
OPS = [pytest.param("reference", c, marks=[pytest.mark.proof] * (c > 0)) for c in range(len(CASES))]
OPS += [
    pytest.param("cpu", c, marks=[needs_cpu] + [pytest.mark.proof] * (c not in (0, 6, 8)))
    for c in range(len(CASES))
]


@pytest.mark.parametrize(("backend", "case"), OPS)
@pytest.mark.parametrize("autocast", [False, True])
def test_opcheck(backend, case, autocast):
    """Schema, aliasing, fake shapes and strides, under autograd and as AOT traces them."""
    inputs = op_inputs(**CASES[case])
    x, weights, states, rows, options = groups(inputs)
    gamma, ops = weights.gamma, torch.ops.rnnfast
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.library.opcheck(ops.rnn.default, (*inputs, backend))
        y, h_n, c_n, *saved, cells = ops.rnn(*inputs, backend)
        saved, (of_c, of_cells) = present(saved), present([c_n, cells])
        if not options.saves:  # there is nothing for backward
            return
        assert y.dtype == h_n.dtype == x.dtype  # autocast does not leak in
        for grads, dx_wanted, dw_wanted in (
            ((torch.randn_like(y), torch.randn_like(h_n), of_c, of_cells), True, True),
            ((None, h_n, None, None), False, True),
            ((y, None, of_c, None), True, False),
        ):
            kept = (x, y, *weights, *states, *rows, *saved)
            args = (*grads, *kept, dx_wanted, dw_wanted, *options, backend)
            torch.library.opcheck(ops.rnn_backward.default, args)
            dx, *dw, dgamma, dbeta, _, dh_0, dc_0 = ops.rnn_backward(*args)
            assert {g.dtype for g in (dx, *dw, dh_0, dc_0)} == {x.dtype}
            if dw_wanted and gamma is not None:
                assert dgamma.dtype == dbeta.dtype == gamma.dtype


@pytest.mark.parametrize(("backend", "case"), OPS)
def test_the_shapes_that_a_graph_is_built_on_are_the_real_ones(backend, case):
    """Strides too: inductor relies on them."""
    inputs = op_inputs(**CASES[case])
    ops = torch.ops.rnnfast
    made = y, h_n, c_n, *saved, cells = ops.rnn(*inputs, backend)
    x, weights, states, rows, options = groups(inputs)
    if not options.saves:
        return  # there is nothing for backward
    of_c, of_cells = present([c_n, cells])
    kept = (y, h_n, of_c, of_cells, x, y, *weights, *states, *rows, *present(saved))
    wanted = (True, True, *options, backend)
    grads = ops.rnn_backward(*kept, *wanted)

    def meta(x):
        return x.to("meta") if isinstance(x, Tensor) else x

    fake = ops.rnn(*map(meta, inputs), backend)
    fake += ops.rnn_backward(*map(meta, kept), *wanted)
    for a, b in zip((*made, *grads), fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
