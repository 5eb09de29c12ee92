"""Results lie in memory as nn.RNN's do, whatever the strides of the input are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from twins import EXACT, twins

import rnnfast
from rnnfast.recurrence.groups import Options, Rows, Saved, States, Weights

I = 3  # noqa: E741
# One step, one row and one feature leave strides open that a shape alone would not tell.
SIZES = [(4, 3, 5), (1, 3, 5), (4, 1, 5), (4, 3, 1), (1, 1, 1), (4, 0, 5)]
MADE = {
    "dense": lambda shape: torch.randn(shape, dtype=EXACT),
    "transposed": lambda shape: torch.randn(shape[1], shape[0], *shape[2:], dtype=EXACT).transpose(
        0, 1
    ),
    "features first": lambda shape: torch.randn(shape[2], *shape[:2], dtype=EXACT).permute(1, 2, 0),
    "every other feature": lambda shape: torch.randn(*shape[:2], 2 * shape[2], dtype=EXACT)[
        ..., ::2
    ],
    "one row for all": lambda shape: torch.randn(shape[2], dtype=EXACT).expand(shape),
}
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5, "bidirectional": True},
}
# Options that nn.RNN lacks must not show in the strides, either.
MORE = {
    "layer norm": {"norm": "layer"},
    "batch norm": {"norm": "batch"},
    "residual": {"residual": True, "input_size": 4},
    "heads": {"num_heads": 2},
    "record": {"track_gradient_flow": "sample"},
    "clipping": {"clip_state_grad": 1.0, "bptt_window": 2},
}


def strides(results: tuple[Tensor, Tensor]) -> list[tuple[int, ...]]:
    return [x.stride() for x in results]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_strides_are_those_of_torch(options, batch_first, backend):
    for T, B, H in SIZES:
        old, new = twins(backend, I, H, batch_first=batch_first, **OPTIONS[options])
        for make in MADE.values():
            x = make((B, T, I) if batch_first else (T, B, I))
            hx = make((*old.get_expected_hidden_size(x, None)[:2], H))
            for inputs in ((x,), (x, hx)):
                wanted = old(*inputs)
                assert strides(new(*inputs)) == strides(wanted), (T, B, H)
                with torch.no_grad():
                    assert strides(new(*inputs)) == strides(wanted), (T, B, H)


@pytest.mark.parametrize("batch_first", [False, True])
def test_strides_of_unbatched_and_packed_input_are_those_of_torch(batch_first, backend):
    for T, _, H in SIZES[:4]:
        old, new = twins(backend, I, H, 2, batch_first=batch_first, bidirectional=True)
        x = torch.randn(I, T, dtype=EXACT).T
        assert strides(new(x)) == strides(old(x))
        for in_order in (True, False):
            lengths = [T, max(T - 1, 1), 1] if in_order else [1, T, max(T - 1, 1)]
            x = MADE["transposed"]((3, T, I) if batch_first else (T, 3, I))
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=in_order)
            found, wanted = ((y.data, h_n) for y, h_n in (new(packed), old(packed)))
            assert strides(found) == strides(wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", MORE)
def test_an_option_does_not_show_in_the_strides(options, batch_first, own_backend):
    options = {"input_size": I} | MORE[options]
    make_rnn = {"hidden_size": 4, "num_layers": 3, "batch_first": batch_first, "dtype": EXACT}
    rnn = rnnfast.RNN(backend=own_backend, **make_rnn, **options)
    old = torch.nn.RNN(options["input_size"], **make_rnn)
    for make in MADE.values():
        T, B = 5, 3
        x = make((B, T, old.input_size) if batch_first else (T, B, old.input_size))
        reset = torch.zeros(x.shape[:2], dtype=torch.bool)
        wanted = strides(old(x))
        assert strides(rnn(x)) == wanted
        assert strides(rnn(x, lengths=[5, 0, 2], reset=reset)) == wanted


def test_lengths_do_not_show_in_the_strides(backend):
    for batch_first in (False, True):
        old, new = twins(backend, I, 4, 2, batch_first=batch_first)
        x = MADE["transposed"]((3, 5, I) if batch_first else (5, 3, I))
        for lengths in ([5, 0, 2], [0, 0, 0]):
            assert strides(new(x, lengths=lengths)) == strides(old(x))


def test_strides_of_functional_rnn_are_dense(own_backend):
    """y and h_n, with the same meaning of their axes, are those of nn.RNN."""
    for T, B, H in SIZES:
        w_hh = torch.randn(2, H, H, dtype=EXACT)
        for make in MADE.values():
            p = make((T, B, 2 * H))
            for found in rnnfast.functional.rnn(p, w_hh, backend=own_backend):
                assert found.stride() == torch.empty(found.shape).stride()


def test_any_view_that_torch_allows_of_an_output(backend):
    T, B, H = 7, 3, 5
    for batch_first in (False, True):
        old, new = twins(backend, I, H, batch_first=batch_first)
        x = MADE["transposed"]((B, T, I) if batch_first else (T, B, I))
        flat = [
            (y.transpose(0, 1) if batch_first else y).view(T * B, H) for y in (new(x)[0], old(x)[0])
        ]
        assert torch.allclose(*flat, atol=1e-5)


def test_the_op_returns_results_and_gradients_in_one_order(own_backend):
    """A compiled graph is built on the strides of the op's fake results."""
    T, B, H = 4, 3, 5
    options = *Options(), own_backend
    w_ih, w_hh, b = (torch.randn(shape, dtype=EXACT) for shape in ((H, I), (H, H), (H,)))
    for make in MADE.values():
        x, grad_y = make((T, B, I)), make((T, B, H))
        weights = Weights(w_ih, b, b, w_hh)
        found = torch.ops.rnnfast.rnn(x, *weights, *States(), *Rows(), None, *options)
        y = found[0]
        kept = x, y, *weights, *States(), *Rows(), *Saved()
        inputs = grad_y, *States(), None, *kept, True, True, *options
        gradients = torch.ops.rnnfast.rnn_backward(*inputs)
        for result in (*found[:2], *gradients):
            assert result.is_contiguous()
