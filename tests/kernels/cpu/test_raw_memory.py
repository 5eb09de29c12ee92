"""The kernels take addresses: nothing may reach them that they would misread."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast.backends import cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")
T, B, I, H = 5, 3, 8, 16  # noqa: E741


def layer(**options) -> rnnfast.RNN:
    torch.manual_seed(0)
    return rnnfast.RNN(I, H, backend="cpu", **options)


def x() -> torch.Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(1))


def test_float64_input_under_autocast_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"float64"):
        layer()(x().double())


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda w: w.half(), "float16"),
        (lambda w: w.to("meta"), "meta"),
        (lambda w: w[:2], r"shape \(2|bias_ih|square"),
        (lambda w: torch.cat([w, w]), r"shape \(32|square"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_by_its_name(name, change, wanted):
    rnn = layer()
    setattr(rnn, name, nn.Parameter(change(getattr(rnn, name).detach())))
    with pytest.raises((RuntimeError, ValueError), match=wanted):
        rnn(x())


def test_one_bias_without_the_other_is_refused():
    rnn = layer()
    rnn.bias_ih_l0 = None
    with pytest.raises(RuntimeError, match="bias_ih, bias_hh: given one of them"):
        rnn(x())


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_a_dtype_without_kernels_is_refused_under_autocast(dtype):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=str(dtype)):
        layer()(x().to(dtype))


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_a_trace_holds_the_op():
    rnn = layer()
    with torch.no_grad():
        traced = torch.jit.trace(rnn, (x(),))
        again = x() * 2
        assert torch.equal(traced(again)[0], rnn(again)[0])


def test_a_pending_negation_is_done():
    for H in (1, 3):
        rnn = rnnfast.RNN(1, H, backend="cpu")
        z = torch.randn(T, B, 1, dtype=torch.complex64)
        negative = z.conj().imag
        assert negative.is_neg()
        assert torch.equal(rnn(negative)[0], rnn(negative.clone())[0])
        y, _ = rnn(x()[..., :1].requires_grad_())
        grad = torch.randn(*y.shape, dtype=torch.complex64).conj().imag
        pair = (torch.autograd.grad(y, rnn.weight_hh_l0, g, retain_graph=True)[0]
                for g in (grad, grad.clone()))  # fmt: skip
        assert torch.equal(*pair)


def test_zeros_without_memory():
    rnn, zero = layer(), torch._efficientzerotensor(T, B, I)
    assert torch.equal(rnn(zero)[0], rnn(torch.zeros(T, B, I))[0])


def test_what_a_transform_left_behind_is_a_tensor_like_any_other():
    left = []

    def keep(v):
        left.append(v)
        return v.sum()

    torch.func.grad(keep)(x())
    rnn = layer()
    assert torch.equal(rnn(left[0])[0], rnn(x())[0])
    with torch.no_grad():
        assert torch.equal(rnn(left[0])[0], rnn(x())[0])


def test_saved_tensors_may_come_back_in_another_layout():
    rnn, wanted = layer(), layer()

    def results(module):
        y, h_n = module(x())
        return torch.autograd.grad(y.square().sum() + h_n.sum(), module.parameters())

    transposed = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t
    )
    with transposed:
        y, h_n = rnn(x())
    found = torch.autograd.grad(y.square().sum() + h_n.sum(), rnn.parameters())
    for a, b in zip(found, results(wanted)):
        assert torch.equal(a, b)


def test_lengths_that_change_after_the_check_are_not_read():
    rnn, lengths = layer(bidirectional=True), torch.tensor([5, 2, 4])
    y, _ = rnn(x(), lengths=lengths)
    wanted = torch.autograd.grad(y.sum(), list(rnn.parameters()), retain_graph=True)
    lengths.fill_(1000)
    for a, b in zip(torch.autograd.grad(y.sum(), list(rnn.parameters())), wanted):
        assert torch.equal(a, b)


def test_the_gradients_of_the_two_biases_are_two_tensors():
    rnn = layer()
    rnn(x())[0].sum().backward()
    a, b = rnn.bias_ih_l0.grad, rnn.bias_hh_l0.grad
    assert torch.equal(a, b)
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_an_infinite_bias_gradient_is_infinite(value):
    ours, theirs = layer(nonlinearity="relu"), nn.RNN(I, H, nonlinearity="relu")
    theirs.load_state_dict(ours.state_dict())
    grad = torch.ones(T, B, H)
    grad[0] = value  # nothing comes before it to be NaN
    found, wanted = (
        torch.autograd.grad(m(x())[0], [m.bias_ih_l0, m.bias_hh_l0], grad) for m in (ours, theirs)
    )
    assert torch.isposinf(found[0]).any()
    for a, b in zip(found, wanted):
        assert torch.equal(torch.isposinf(a), torch.isposinf(b))
        assert torch.equal(a.isnan(), b.isnan())


def test_only_what_backward_reads_is_kept():
    """p may change after a functional call, and x where no weight takes a gradient."""
    p = torch.randn(T, B, H, requires_grad=True)
    w = torch.eye(H, requires_grad=True)
    start = p * 1
    y, _ = rnnfast.functional.rnn(start, w, backend="cpu")
    with torch.no_grad():
        start.zero_()
    torch.autograd.grad(y.sum(), [p, w])
    rnn = layer().requires_grad_(False)
    start = x().requires_grad_() * 1
    y, _ = rnn(start)
    with torch.no_grad():
        start.zero_()
    torch.autograd.grad(y.sum(), start)


def test_a_hidden_size_of_zero_has_gradients_without_values():
    p = torch.randn(T, B, 0, requires_grad=True)
    y, h_n = rnnfast.functional.rnn(p, torch.empty(0, 0), backend="cpu")
    assert y.shape == (T, B, 0)
    assert h_n.shape == (B, 0)
    (dp,) = torch.autograd.grad(y.sum(), p)
    assert dp.shape == p.shape


MAPS = """\
7f0000000000-7f0000001000 r-xp 00000000 fe:00 11 /opt/my torch/lib/libgomp-old.so.1 (deleted)
7f0000002000-7f0000003000 r-xp 00000000 fe:00 12 /opt/sklearn libs/libgomp.so.1
7f0000004000-7f0000005000 r-xp 00000000 fe:00 13 {home}/lib/libgomp.so.1
"""


def test_the_thread_pool_is_that_of_torch_wherever_it_is_installed(monkeypatch):
    """Spaces in paths, a library that is gone, another package's copy that comes first."""
    home = "/opt/zz my torch/torch"
    maps = MAPS.format(home=home)
    opened = []

    class Library:
        GOMP_parallel = omp_get_num_threads = cpu.ctypes.CFUNCTYPE(None)()
        omp_get_thread_num = omp_get_num_procs = GOMP_parallel

        def __init__(self, path):
            opened.append(path)

    monkeypatch.setattr(cpu, "open", lambda path: io.StringIO(maps), raising=False)
    monkeypatch.setattr(cpu.ctypes, "CDLL", Library)
    monkeypatch.setattr(cpu.torch, "__file__", home + "/__init__.py")
    cpu.openmp()
    assert opened == [home + "/lib/libgomp.so.1"]


@pytest.mark.parametrize("size", [(40, 12, 64), (300, 1, 40), (9, 2, 180), (90, 50, 24)])
def test_dx_in_the_memory_of_dp_is_the_same_at_any_number_of_threads(size, cores_enough):
    """I = H: backward computes both in one place."""
    T, B, H = size
    torch.manual_seed(0)
    rnn, start = rnnfast.RNN(H, H, backend="cpu"), torch.randn(T, B, H, requires_grad=True)
    lengths = torch.randint(0, T + 1, (B,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            y, h_n = rnn(start, lengths=lengths)
            loss = y.square().sum() + h_n.sum()
            results.append(torch.autograd.grad(loss, [start, *rnn.parameters()]))
    finally:
        torch.set_num_threads(before)
    wide = rnnfast.RNN(H + 1, H, backend="cpu")  # the same layer, with memory for each
    wide.load_state_dict({k: torch.cat([v, torch.zeros(H, 1)], 1) if k == "weight_ih_l0" else v
                          for k, v in rnn.state_dict().items()})  # fmt: skip
    x = torch.cat([start.detach(), torch.zeros(T, B, 1)], 2).requires_grad_()
    y, h_n = wide(x, lengths=lengths)
    (dx,) = torch.autograd.grad(y.square().sum() + h_n.sum(), x)
    assert torch.allclose(results[0][0], dx[..., :H], rtol=1e-5, atol=1e-6)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))
