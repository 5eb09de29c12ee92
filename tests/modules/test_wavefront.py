"""Layers side by side: stretches of time give what whole sequences give, and on a GPU every lane
waits for what it reads."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from cases import needs_cpu
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast.backends import cuda
from rnnfast.modules import wavefront

T, B = 20, 4
OPTIONS = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "window": {"bptt_window": 3},
    "residual, heads": {"residual": True, "num_heads": 7},
    "clipping": {"clip_state_grad": 0.3, "nonlinearity": "relu"},
    "all of them": {
        "norm": "layer",
        "bptt_window": 2,
        "residual": True,
        "clip_state_grad": 0.3,
        "batch_first": True,
    },
}


def differentiated(rnn, x, *arguments, **more):
    """Results and all gradients."""
    for leaf in (x, *rnn.parameters(), *arguments):
        leaf.grad = None
    y, h_n = rnn(x, *arguments, **more)
    y = y.data if isinstance(y, torch.nn.utils.rnn.PackedSequence) else y
    (y.sin().sum() + h_n.cos().sum()).backward()
    leaves = (x, *rnn.parameters(), *arguments)
    return [y.detach(), h_n.detach(), *(leaf.grad.clone() for leaf in leaves)]


def assert_alike(found, wanted):
    """A state is the same to the bit; gradients are sums of sums."""
    for (i, x), y in zip(enumerate(found), wanted, strict=True):
        tolerance = 0.0 if i < 2 else 1e-12
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=f"{i}")


@needs_cpu
@pytest.mark.parametrize("steps", [6, 18, 20])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stretches_give_what_whole_sequences_give(options, ragged, steps, monkeypatch):
    """Rows that end in any of them, and one without a step."""
    torch.manual_seed(0)
    rnn = rnnfast.RNN(5, 7, 3, dtype=torch.float64, backend="cpu", **options)
    shape = (B, T, 5) if rnn.batch_first else (T, B, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(3, B, 7, dtype=torch.float64, requires_grad=True)
    more = {}
    if ragged:
        more = {"lengths": [T, 0, 13, 6], "reset": torch.rand(shape[:2]) < 0.2}
    wanted = [differentiated(rnn, x, *given, **more) for given in ((), (hx,))]
    monkeypatch.setattr(rnn, "_stretch", lambda *_: steps)
    calls = []
    monkeypatch.setattr(wavefront, "wavefront", counted(calls))
    found = [differentiated(rnn, x, *given, **more) for given in ((), (hx,))]
    assert calls == [steps, steps]
    for ours, theirs in zip(found, wanted):
        assert_alike(ours, theirs)


def counted(calls, run=wavefront.wavefront):
    def wrapped(u, states, steps, *others):
        calls.append(steps)
        return run(u, states, steps, *others)

    return wrapped


@needs_cpu
def test_a_packed_sequence_comes_in_stretches(monkeypatch):
    torch.manual_seed(0)
    rnn = rnnfast.RNN(5, 7, 2, dtype=torch.float64, backend="cpu")
    x = torch.randn(T, 3, 5, dtype=torch.float64, requires_grad=True)

    def run():
        packed = pack_padded_sequence(x, [7, 20, 1], enforce_sorted=False)
        x.grad = None
        y, h_n = rnn(packed)
        (y.data.sin().sum() + h_n.cos().sum()).backward()
        return [y.data.detach(), h_n.detach(), x.grad.clone()]

    wanted = run()
    monkeypatch.setattr(rnn, "_stretch", lambda *_: 4)
    assert_alike(run(), wanted)


@needs_cpu
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"batch_first": True}])
def test_under_autocast(options, monkeypatch):
    """To the bit, and as it lies in memory."""
    torch.manual_seed(0)
    rnn = rnnfast.RNN(7, 7, 3, backend="cpu", **options)
    x = torch.randn(T, 3, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = rnn(x)
        monkeypatch.setattr(rnn, "_stretch", lambda *_: 6)
        found = rnn(x)
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({}, 57),
        ({"bptt_window": 50}, 50),
        ({"num_layers": 1}, 0),
        ({"bidirectional": True}, 0),
        ({"dropout": 0.1}, 0),
        ({"norm": "batch"}, 0),
        ({"track_gradient_flow": True}, 0),
    ],
)
def test_where_layers_can_come_side_by_side(changed, steps, monkeypatch):
    rnn = rnnfast.RNN(**{"input_size": 4, "hidden_size": 8, "num_layers": 4} | changed)
    problem = rnn._problem(torch.zeros(T, B, 4))
    monkeypatch.setattr(cuda, "overlap_capacity", lambda _: (2.0, 132))
    assert rnn._stretch("cuda", 512, problem) == 0  # off
    monkeypatch.setattr(wavefront, "ENABLED", True)
    assert rnn._stretch("cuda", 512, problem) == steps
    assert rnn._stretch("triton", 512, problem) == 0
    if "dropout" in changed:
        assert rnn.eval()._stretch("cuda", 512, problem) > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_not_where_time_is_traced_or_computed_again(monkeypatch):
    rnn = rnnfast.RNN(4, 8, 4)
    problem = rnn._problem(torch.zeros(T, B, 4))
    monkeypatch.setattr(cuda, "overlap_capacity", lambda _: (2.0, 132))
    monkeypatch.setattr(wavefront, "ENABLED", True)
    found = []

    def ask(x):
        found.append(rnn._stretch("cuda", 512, problem))
        return x * x

    x = torch.ones(1, requires_grad=True)
    checkpoint(ask, x, use_reentrant=False).backward()
    torch.jit.trace(ask, x, check_trace=False)
    assert found == [0, 0, 0]
    ask(x)
    assert found[-1] > 0


def test_stretches_are_worth_their_calls_and_whole_windows():
    for T, layers, window, step, room in itertools.product(
        (1, 64, 2000), (1, 2, 8), (None, 1, 7, 3000), (0.0, 0.4, 5.0), (0, 1, 2, 132)
    ):
        steps = wavefront.steps_of_stretch(T, layers, window, step, room)
        assert steps == 0 or (1 <= steps < T and steps % (window or 1) == 0)
        if layers == 1 or step == 0 or (window or 1) >= T or room < 2:
            assert steps == 0
    assert wavefront.steps_of_stretch(2000, 8, None, 5.0, 132) > 0
    assert wavefront.steps_of_stretch(64, 8, None, 0.4, 132) == 0  # the host is no faster


class Clock:
    """Streams that know what has happened before what they do next."""

    def __init__(self):
        self.caller, self.current = Stream(), None
        self.current = self.caller

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, *_):
        self.done = set()

    def wait_stream(self, other):
        self.done |= other.done


@pytest.mark.parametrize("fault", [None, "below", "end"])
def test_every_lane_waits_for_what_it_reads(fault, monkeypatch):
    """As the streams' own waits order it, not as the host comes by."""
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: clock.caller)
    monkeypatch.setattr(torch.cuda, "stream", clock.stream)
    monkeypatch.setattr(wavefront, "_STREAMS", {})
    of_device = wavefront.Lanes
    monkeypatch.setattr(wavefront, "Lanes", lambda _, n: of_device(torch.device("cuda"), n))
    clock.caller.done.add("weights")
    waits = Stream.wait_stream

    def wait_stream(self, other):  # one kind of wait is left out
        if fault != ("end" if self is clock.caller else "below"):
            waits(self, other)

    monkeypatch.setattr(Stream, "wait_stream", wait_stream)
    missed, seen, made = [], [], []

    def compute(layer, x, h, span):
        reads = {"weights"} if layer else set()
        reads |= {(layer - 1, span.start)} if layer else set()
        reads |= {(layer, span.start - 5)} if span.start else set()
        missed.extend(reads - clock.current.done)
        clock.current.done.add((layer, span.start))
        seen.append(clock.current)
        made.append((layer, x))
        return x + 1, h + 1

    held = set()
    monkeypatch.setattr(
        of_device, "hold", lambda lanes, i, *tensors: held.update((i, id(x)) for x in tensors)
    )
    weight, states = torch.zeros(1), [torch.zeros(1) for _ in range(3)]
    x = torch.zeros(T, B, 2)
    stretches, found = wavefront.wavefront(x, states, 5, compute, [weight])
    assert all((y == 3).all() for y in stretches)
    # Tensors that another lane, or the caller, has made.
    assert {(i, id(y)) for i, y in made if i} <= held
    assert {(0, id(y)) for y in (*stretches, *found)} <= held
    assert {(i, id(y)) for i in (1, 2) for y in (weight, states[i])} <= held
    states = found
    assert states == [4, 4, 4]
    assert len({id(stream) for stream in seen}) == 3
    everything = {(layer, t) for layer in range(3) for t in range(0, T, 5)}
    missed.extend(everything - clock.caller.done)
    assert bool(missed) == (fault is not None)
