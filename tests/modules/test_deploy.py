"""Around a program: decompositions, counts of operations, names in a profiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import rnnfast

# torch.export warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
ROOT = Path(__file__).parents[2]
IN, H = 5, 6


# --------------------------------------------------------------------------------- decompositions


def table():
    found = torch.export.default_decompositions()
    found.update(rnnfast.decompositions())
    return found


def ops_of(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.proof
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"},
        {"norm": "layer", "num_heads": 2, "nonlinearity": "sigmoid"},
        {"norm": "batch", "residual": True, "num_layers": 3},
        {"clip_state_grad": 0.1, "bptt_window": 2, "track_gradient_flow": True},
    ],
)
def test_a_decomposed_program_has_ops_of_torch_alone(arguments, own_backend):
    rnn = rnnfast.RNN(IN, H, backend=own_backend, **arguments).eval()
    B = Dim("B", min=2, max=64)
    given = torch.randn(7, 3, IN)
    program = torch.export.export(rnn, (given,), dynamic_shapes=({1: B},))
    decomposed = program.run_decompositions(table())
    found = ops_of(decomposed.graph)
    assert found
    assert all(name.startswith(("aten.", "<built-in")) for name in found), found
    for x in (given, torch.randn(7, 8, IN)):
        for mine, wanted in zip(decomposed.module()(x), rnn(x)):
            torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)


def test_lengths_and_reset_stay_inputs_of_a_decomposed_program():
    rnn = rnnfast.RNN(IN, H, bidirectional=True).eval()
    x, lengths = torch.randn(7, 3, IN), torch.tensor([7, 0, 4])
    inputs = {"lengths": lengths, "reset": torch.rand(7, 3) < 0.3, "hx": torch.randn(2, 3, H)}
    decomposed = torch.export.export(rnn, (x,), inputs).run_decompositions(table()).module()
    inputs["lengths"] = torch.tensor([1, 5, 7])
    for mine, wanted in zip(decomposed(x, **inputs), rnn(x, **inputs)):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)


def test_a_dynamic_number_of_steps_cannot_be_decomposed():
    rnn, T = rnnfast.RNN(IN, H), Dim("T", min=2, max=64)
    program = torch.export.export(rnn, (torch.randn(7, 3, IN),), dynamic_shapes=({0: T},))
    with pytest.raises(RuntimeError, match="given a dynamic number of time steps, wanted a fixed"):
        program.run_decompositions(table())


@pytest.mark.parametrize("arguments", [{}, {"norm": "layer", "bidirectional": True}])
def test_backward_is_decomposed_too(arguments, own_backend):
    rnn = rnnfast.RNN(IN, H, backend=own_backend, **arguments)
    names = list(dict(rnn.named_parameters()))

    def gradients(x, *weights):
        y, h_n = torch.func.functional_call(rnn, dict(zip(names, weights)), (x,))
        return torch.autograd.grad(y.square().sum() + h_n.sum(), [x, *weights])

    given = [x.detach().requires_grad_() for x in (torch.randn(4, 3, IN), *rnn.parameters())]
    if own_backend != "reference":  # which is eager as it is
        plain = make_fx(gradients, tracing_mode="fake")(*given)
        assert any("rnn_backward" in name for name in ops_of(plain.graph))
    traced = make_fx(gradients, decomposition_table=rnnfast.decompositions(), tracing_mode="fake")
    graph = traced(*given)
    assert not any("rnnfast" in name for name in ops_of(graph.graph))
    for mine, wanted in zip(graph(*given), gradients(*given)):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------ counts of products


def flops(rnn: nn.Module, x: torch.Tensor, *more: torch.Tensor) -> tuple[int, int]:
    """FLOPs of forward and of backward."""
    with FlopCounterMode(display=False) as forward:
        y, h_n = rnn(x, *more)
    with FlopCounterMode(display=False) as backward:
        (y.sum() + h_n.sum()).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("h_learns", [None, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False}, {"num_layers": 3}, {"bidirectional": True}, {"batch_first": True}],
)
def test_flops_are_those_of_nn_rnn(arguments, x_learns, h_learns, own_backend):
    counts = []
    for kind, named in ((nn.RNN, {}), (rnnfast.RNN, {"backend": own_backend})):
        rnn = kind(IN, H, **arguments, **named)
        x = torch.randn(7, 3, IN, requires_grad=x_learns)
        layers = rnn.num_layers * (1 + rnn.bidirectional)
        rows = 7 if rnn.batch_first else 3
        more = [torch.randn(layers, rows, H, requires_grad=True)] if h_learns else []
        counts.append(flops(rnn, x, *more))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_flops_of_heads_are_those_of_their_blocks():
    x = torch.randn(7, 3, IN)
    forward, backward = flops(rnnfast.RNN(IN, H, num_heads=3, norm="layer"), x)
    assert forward == 2 * 7 * 3 * (IN * H + H * 2)
    assert backward == 2 * 3 * (7 * IN * H + (6 + 7) * H * 2)


def test_flops_of_a_recorded_pass_are_those_of_a_plain_one():
    x = torch.randn(7, 3, IN)
    assert flops(rnnfast.RNN(IN, H, track_gradient_flow=True), x) == flops(rnnfast.RNN(IN, H), x)


def test_flops_of_a_program_are_those_of_its_module():
    rnn, x = rnnfast.RNN(IN, H), torch.randn(7, 3, IN)
    program = torch.export.export(rnn, (x,)).module()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        program(x)
    assert counter.get_total_flops() == flops(rnn, x)[0]


@pytest.mark.proof
@pytest.mark.parametrize(
    "imports",
    [
        "import rnnfast; assert 'torch.utils.flop_counter' not in __import__('sys').modules",
        "import torch.utils.flop_counter, rnnfast",
        "import rnnfast, sys; [sys.modules.pop(n) for n in list(sys.modules) if 'rnnfast' in n]; "
        "import rnnfast",
    ],
    ids=["counter later", "counter first", "imported again"],
)
def test_flops_are_counted_whatever_is_imported_first(imports):
    code = f"""
import torch
{imports}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rnnfast.RNN(5, 6)(torch.randn(7, 3, 5))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{2 * 7 * 3 * (5 * 6 + 6 * 6)}\n"), done.stderr


# ---------------------------------------------------------------------------- names in a profiler


@pytest.mark.parametrize("record", [False, True])
def test_a_profiler_shows_forward_and_backward_by_name(record, own_backend):
    rnn = rnnfast.RNN(IN, H, backend=own_backend, track_gradient_flow=record)
    x = torch.randn(7, 3, IN)
    wanted = rnn(x)[0]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y, _ = rnn(x)
        y.sum().backward()
    assert torch.equal(y, wanted)
    names = {event.key: event.count for event in profiler.key_averages()}
    if own_backend == "reference" and not record:  # ops of torch alone
        assert names["aten::tanh"] == 7
        return
    backward = "rnn_backward_recorded" if record else "rnn_backward"
    assert names["rnnfast::rnn"] == 1
    assert names[f"rnnfast::{backward}"] == 1
