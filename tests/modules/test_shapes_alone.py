"""Where tensors have shapes and no values: on "meta" and in FakeTensorMode."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from rnnfast.backends import cpu
from rnnfast.gradient_flow.sums import Pass, newest
from rnnfast.recurrence.record import NEVER

T, B, I, H = 7, 3, 5, 6  # noqa: E741
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "batch first": {"batch_first": True},
    "layer norm": {"norm": "layer"},
    "batch norm": {"norm": "batch"},
    "record": {"track_gradient_flow": "sample"},
    "residual": {"num_layers": 3, "residual": True},
}
LENGTHS = {
    "none": lambda: None,
    "list": lambda: [7, 3, 2],
    "tensor": lambda: torch.tensor([7, 3, 2], dtype=torch.int32),
    "tensor on the CPU": lambda: torch.tensor([7, 3, 2], device="cpu"),
}
MODES = {"fake": FakeTensorMode, "meta": lambda: torch.device("meta")}
needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


@pytest.mark.parametrize("backend", ["auto", pytest.param("cpu", marks=needs_cpu), "torch"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_shapes_of_results_and_gradients(mode, options, lengths, backend):
    options = OPTIONS[options]
    refused = (backend == "cpu" and mode == "meta") or (
        backend == "torch" and {"norm", "track_gradient_flow", "residual"} & options.keys()
    )
    old = torch.nn.RNN(I, H, **{k: v for k, v in options.items() if k in torch_options()})
    shape = (B, T, I) if old.batch_first else (T, B, I)
    wanted = [(y.shape, y.stride()) for y in old(torch.randn(shape))]
    with MODES[mode](), pytest.raises(RuntimeError) if refused else contextlib.nullcontext():
        rnn = rnnfast.RNN(I, H, backend=backend, **options)
        x = torch.randn(shape, requires_grad=True)
        output, h_n = rnn(x, lengths=LENGTHS[lengths]())
        assert output.device == h_n.device == x.device
        assert [(y.shape, y.stride()) for y in (output, h_n)] == wanted
        (output.sum() + h_n.sum()).backward()
        assert all(p.grad.shape == p.shape for p in (x, *rnn.parameters()))


def torch_options() -> set[str]:
    return {"num_layers", "bidirectional", "dropout", "batch_first"}


@pytest.mark.parametrize("mode", MODES)
def test_a_record_without_values_is_none(mode):
    with MODES[mode]():
        rnn = rnnfast.RNN(I, H, track_gradient_flow=True)
        rnn(torch.randn(T, B, I))[0].sum().backward()
        assert "gradient_flow" not in dir(rnn)
        with pytest.raises(
            RuntimeError, match=r"no backward pass|cannot be read under FakeTensorMode"
        ):
            _ = rnn.gradient_flow
        assert newest(rnn._records) == NEVER
        Pass.of(rnn._records, 1.0)


def test_lengths_in_a_list_are_checked_without_values_too():
    with torch.device("meta"):
        rnn = rnnfast.RNN(I, H)
        with pytest.raises(ValueError, match="lengths: given 8, wanted 0 to T = 7"):
            rnn(torch.randn(T, B, I), lengths=[8, 1, 1])


def test_training_batch_norm_on_a_single_point_is_refused_where_it_is_known():
    rnn = rnnfast.RNN(I, H, norm="batch")
    for lengths in (None, [1]):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            rnn(torch.randn(1, 1, I), lengths=lengths)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        rnn(torch.randn(T, B, I), lengths=[0, 1, 0])
