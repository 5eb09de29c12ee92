"""Among what PyTorch has for GPUs: streams, graphs, autocast, the compiler, several devices."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from cases import has_room
from torch import Tensor
from twins import assert_same_results, results

import rnnfast

# Here other people's warnings are not ours to judge: torch.compile about TF32, prototypes, streams.
pytestmark = pytest.mark.filterwarnings("default")

T, B, IN, H = 6, 3, 5, 8
PLAIN = {"num_layers": 2, "bidirectional": True}
OPTIONS = {
    "norm": {"norm": "layer", "num_heads": 2, "bptt_window": 4, "clip_state_grad": 0.5},
    "batch norm": {"norm": "batch"},
    "recorded": {"track_gradient_flow": True},
}


def make(backend: str, device: str, **options) -> tuple[rnnfast.RNN, Tensor]:
    rnn = rnnfast.RNN(IN, H, backend=backend, device=device, **options)
    return rnn, torch.randn(T, B, IN, device=device, dtype=rnn.weight_hh_l0.dtype)


def all_equal(found: dict[str, Tensor] | list, wanted: dict[str, Tensor] | list) -> bool:
    pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (found, wanted)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_as_a_cast_module_does(dtype, backend, device):
    rnn, x = make(backend, device, num_layers=2)
    twin = copy.deepcopy(rnn).to(dtype)
    with torch.autocast(device, dtype):
        y, h_n = rnn(x)
    wanted, wanted_n = twin(x.to(dtype))
    assert y.dtype == h_n.dtype == dtype
    assert torch.equal(y, wanted)
    assert torch.equal(h_n, wanted_n)
    y.float().square().sum().backward()
    wanted.float().square().sum().backward()
    for p, q in zip(rnn.parameters(), twin.parameters()):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad.float())


def test_grad_scaler_changes_nothing_and_skips_what_is_not_finite(backend, device):
    rnn, x = make(backend, device)
    twin = copy.deepcopy(rnn)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer, plain = (torch.optim.SGD(m.parameters(), 0.1) for m in (rnn, twin))
    scaler.scale(rnn(x)[0].square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x)[0].square().sum().backward()
    plain.step()
    assert all_equal(list(rnn.parameters()), list(twin.parameters()))  # powers of 2 round nothing
    optimizer.zero_grad()
    scaler.scale(rnn(x)[0].sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all_equal(list(rnn.parameters()), list(twin.parameters()))


# ---------------------------------------------------------------------- the host and the device


@pytest.mark.gpu(1)
@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_waits_for_the_gpu(options, own_backend, device):
    """Nor are lengths looked at: they are clamped."""
    rnn, x = make(own_backend, device, **PLAIN, **OPTIONS[options])
    lengths = torch.tensor([9, -4, 5], device=device)
    reset = torch.rand(T, B, device=device) < 0.3
    state = copy.deepcopy(rnn.state_dict())
    wanted = results(rnn, x, lengths=[T, 0, 5], reset=reset)
    rnn.load_state_dict(state)
    leaves = [x.requires_grad_(), *rnn.parameters()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, h_n = rnn(x, lengths=lengths, reset=reset)
        gradients = torch.autograd.grad(y.square().sum() + h_n.sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, wanted["output"])
    assert torch.equal(h_n, wanted["h_n"])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.gpu(1)
def test_work_goes_to_the_current_stream(backend, device):
    """A kernel on another stream would read x before it is there."""
    rnn, real = make(backend, device, **PLAIN)
    grad = torch.randn(T, B, 2 * H, device=device)

    def step(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, h_n = rnn(x)
        return [y, h_n, *torch.autograd.grad(y, [x, *rnn.parameters()], grad)]

    wanted = step(real)
    x, side = torch.full_like(real, torch.nan), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles
        x.copy_(real)
        found = step(x)
    side.synchronize()
    assert all_equal(found, wanted)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("options", ["plain", *OPTIONS])
def test_cuda_graph_replays_on_new_input(options, backend, device):
    if options != "plain" and backend == "torch":
        pytest.skip("nn.RNN has no such option")
    rnn, x = make(backend, device, **PLAIN, **OPTIONS.get(options, {}))
    rnn.eval()  # running statistics stay
    x.requires_grad_()

    def step() -> list[Tensor]:
        y, h_n = rnn(x)
        leaves = [x, *rnn.parameters()]
        return [y, h_n, *torch.autograd.grad(y.square().sum() + h_n.sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [v.clone() for v in found]
    flow = rnn.gradient_flow.state_norm if rnn.track_gradient_flow else None
    assert all_equal(replayed, step())
    if flow is not None:
        assert torch.equal(flow, rnn.gradient_flow.state_norm)


FIRST = """
import torch, rnnfast
p, w_hh = torch.randn(9, 3, 24, device="cuda"), torch.randn(24, 24, device="cuda")
graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.graph(graph, stream=side):
    y, h_n = rnnfast.functional.rnn(p, w_hh, backend="cuda")
p.normal_()
graph.replay()
wanted, _ = rnnfast.functional.rnn(p, w_hh, backend="cuda")
assert torch.equal(y, wanted)
"""


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kernel", ["", "streaming"])
def test_first_call_of_a_process_may_be_in_a_capture(kernel, device):
    """Loading kernels and asking the device are no work of a stream."""
    if not has_room("cuda", 24, torch.float32, device):
        pytest.skip("the CUDA kernels cannot run here")
    env = os.environ | {"RNNFAST_CUDA_KERNEL": kernel}
    subprocess.run([sys.executable, "-c", FIRST], check=True, timeout=100, env=env)


@pytest.mark.gpu(2)
def test_second_gpu_while_the_first_is_current(backend, device):
    rnn, x = make(backend, device, **PLAIN)
    wanted = results(rnn, x)
    found = results(copy.deepcopy(rnn).to("cuda:1"), x.to("cuda:1"))
    assert all(v.device.index == 1 for v in found.values())
    assert all_equal([v.cpu() for v in found.values()], [v.cpu() for v in wanted.values()])


def test_tensors_on_two_devices_are_refused(backend, own_backend, device):
    other = "meta" if device == "cpu" else "cpu"
    rnn, x = make(backend, device)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same"):
        rnn(x.to(other))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same"):
        rnn(x, torch.zeros(1, B, H, device=other))
    p, w_hh = torch.randn(T, B, H, device=device), torch.eye(H, device=other)
    with pytest.raises(RuntimeError, match=f"w_hh: it is on {other}, and p on {device}"):
        rnnfast.functional.rnn(p, w_hh, backend=own_backend)


@pytest.mark.gpu(1)
def test_cpu_backend_refuses_a_gpu(device):
    rnn, x = make("cpu", device)
    with pytest.raises(rnnfast.BackendError, match="it computes on the CPU"):
        rnn(x)


# --------------------------------------------------------------------------------- the compiler


def test_compiles_without_a_break(backend, exact, device):
    torch._dynamo.reset()
    rnn, x = make(backend, device, dtype=exact)
    x = x[:3]
    compiled = torch.compile(
        rnn, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor"
    )
    wanted = results(rnn, x)
    found = results(compiled, x)
    found = {name.replace("_orig_mod.", ""): v for name, v in found.items()}
    assert_same_results(found, wanted)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------ layers side by side


@pytest.mark.parametrize("options", [{}, OPTIONS["norm"] | {"residual": True}], ids=["", "norm"])
def test_layers_side_by_side_give_what_they_give_in_turn(options, backend, device, monkeypatch):
    """Twice, since the second time finds memory that the first has let go; then captured."""
    if backend != "cuda":
        pytest.skip("layers of other backends come one after another")
    rnn = rnnfast.RNN(8, 8, 3, backend=backend, device=device, **options)
    steps = 4000 if device == "cuda" else 40  # so many that the host is ahead
    x = torch.randn(steps, B, 8, device=device, requires_grad=True)

    def run() -> list[Tensor]:
        y, h_n = rnn(x)
        leaves = (x, *rnn.parameters())
        return [y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), leaves)]

    wanted = run()
    monkeypatch.setattr(rnn, "_stretch", lambda *_: steps // 5)
    for _ in range(2):
        torch.testing.assert_close(run(), wanted)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(rnn(x)[0], wanted[0])
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, wanted)
