"""Backward refuses a saved tensor that comes back as another one, before a kernel reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import MODULE_BACKENDS, needs_cpu
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from twins import EXACT

import rnnfast
from rnnfast.recurrence import record
from rnnfast.recurrence.groups import Options, Saved, States, Weights

T, B, I, H = 7, 3, 5, 6  # noqa: E741
KERNELS = [p for p in MODULE_BACKENDS if p.values[0] in ("cpu", "cuda", "triton")]
NARROW, WIDE = (torch.float16, torch.float64) if EXACT.itemsize == 4 else (torch.float32,) * 2
CHANGES = {
    "narrower": lambda t: t.to(NARROW) if t.is_floating_point() else t.to(torch.int32),
    "wider": lambda t: t.to(WIDE) if t.is_floating_point() else t.float(),
    "without its last": lambda t: t[..., :-1],
    "without its first": lambda t: t[1:],
    "flat": lambda t: t.flatten(),
    "with one more axis": lambda t: t.unsqueeze(0),
    "on another device": lambda t: t.to("meta"),
}
OPTIONS = {
    "plain": {},
    "layer norm": {"norm": "layer", "bidirectional": True},
    "heads and record": {"num_heads": 2, "track_gradient_flow": True},
    "LSTM": {"kind": rnnfast.LSTM, "num_heads": 2, "track_gradient_flow": True},
    "GRU": {"kind": rnnfast.GRU, "bidirectional": True},
}


def make(
    backend: str, kind: type = rnnfast.RNN, **options
) -> tuple[rnnfast.RNN | rnnfast.LSTM | rnnfast.GRU, list[Tensor]]:
    """A module, x and the states."""
    if kind is not rnnfast.RNN and backend in ("cuda", "triton"):
        pytest.skip(f"{backend} has no kernel of this cell")
    rnn = kind(I, H, backend=backend, dtype=EXACT, **options)
    D = 2 if rnn.bidirectional else 1
    states = [(D, B, H)] * (2 if kind is rnnfast.LSTM else 1)
    inputs = [torch.randn(shape, dtype=EXACT) for shape in [(T, B, I), *states]]
    return rnn, [x.requires_grad_() for x in inputs]


def saved_by(rnn: torch.nn.RNNBase, inputs: list[Tensor], change: Callable, which: int):
    """Results whose backward gets the saved tensor of that number changed; and what was saved."""
    saved = []

    def pack(t: Tensor) -> tuple[int, Tensor]:
        saved.append(t)
        return len(saved) - 1, t

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        number, t = packed
        return change(t) if number == which else t

    reset = torch.zeros(T, B, dtype=torch.bool)
    x, *states = inputs
    with saved_tensors_hooks(pack, unpack):
        y, last = rnn(x, tuple(states) if states[1:] else states[0], lengths=[7, 3, 5], reset=reset)
    return (y, *(last if states[1:] else (last,))), saved


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_saved_tensor_that_comes_back_as_another_is_refused(change, options, backend):
    rnn, inputs = make(backend, **OPTIONS[options])
    _, saved = saved_by(rnn, inputs, CHANGES[change], -1)
    assert len(saved) >= 7
    for which, before in enumerate(saved):
        after = CHANGES[change](before)
        if (after.dtype, after.shape, after.device) == (before.dtype, before.shape, before.device):
            continue
        for used in range(len(inputs)):  # a loss on the output, on one of the last states
            results, _ = saved_by(rnn, inputs, CHANGES[change], which)
            with pytest.raises(RuntimeError, match=r"given|same device|must match|size"):
                torch.autograd.grad(results[used].sum(), [*inputs, *rnn.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "values"), [("RNN", 0), ("LSTM", 5), ("GRU", 4)])
@needs_cpu
def test_backward_needs_what_the_cell_saves_and_nothing_else(kind, values, dtype):
    """Beside x, y, the states and the weights: so many values of a unit and step."""
    rnn = getattr(rnnfast, kind)(I, H, backend="cpu", dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    sizes = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y, _ = rnn(x)
    states = 2 if kind == "LSTM" else 1
    weights = sum(w.nbytes for n, w in rnn.named_parameters() if n.startswith("weight"))
    given = x.nbytes + weights + states * B * H * dtype.itemsize
    assert sum(sizes.values()) <= given + (1 + values) * y.nbytes


@needs_cpu
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 3}])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_backward_keeps_inputs_weights_and_outputs_and_nothing_else(options, with_lengths):
    rnn = rnnfast.RNN(I, H, backend="cpu", **options)
    x = torch.randn(6, 6, I, requires_grad=True)
    lengths = torch.arange(1, 7) if with_lengths else None
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = rnn(x, lengths=lengths)
    known = {v.untyped_storage().data_ptr() for v in (x, y, *rnn.parameters())}
    others = {v.untyped_storage().data_ptr(): v for v in kept}
    others = [v for address, v in others.items() if address not in known]
    between = [v for v in others if v.is_floating_point()]
    # the input of each layer after the first is the output of the one before: [T, B, H]
    assert len(between) == rnn.num_layers - 1
    assert all(v.numel() == y.numel() for v in between)
    assert sum(v.numel() for v in others if not v.is_floating_point()) <= x.shape[0]  # lengths
    assert len(kept) >= 3


@needs_cpu
def test_what_two_directions_keep_beside_that_does_not_grow_with_time():
    """The weights side by side."""
    sizes = []
    for steps in (4, 40):
        rnn, kept = rnnfast.RNN(I, H, bidirectional=True, backend="cpu"), {}
        x = torch.randn(steps, B, I, requires_grad=True)
        with saved_tensors_hooks(lambda v, kept=kept: kept.setdefault(id(v), v), lambda v: v):
            y, _ = rnn(x)
        known = {v.untyped_storage().data_ptr() for v in (x, y, *rnn.parameters())}
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in kept.values()}
        sizes.append(sum(s.nbytes() for at, s in storages.items() if at not in known))
    weights = sum(p.nbytes for name, p in rnn.named_parameters() if "weight" in name)
    assert sizes[0] == sizes[1] <= weights


@pytest.mark.parametrize("backend", KERNELS)
def test_all_saved_tensors_in_another_dtype_are_refused(backend):
    rnn, inputs = make(backend)
    to_half = lambda t: t.half() if t.is_floating_point() else t  # noqa: E731
    with saved_tensors_hooks(to_half, lambda t: t):
        output, h_n = rnn(*inputs)
    for result in (output, h_n):
        with pytest.raises(
            RuntimeError, match=rf"saved output: given torch.float16, wanted {EXACT}"
        ):
            torch.autograd.grad(result.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_module_that_changes_its_dtype_before_backward_is_refused(create_graph, backend):
    """.half() puts other memory under the parameters that were saved, unseen by autograd."""
    rnn, inputs = make(backend)
    output = rnn(*inputs)[0]
    rnn.half()
    with pytest.raises(RuntimeError, match=rf"given torch.float16, wanted {EXACT}"):
        torch.autograd.grad(output.sum(), inputs, create_graph=create_graph)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_compressed_tensor_that_is_restored_is_taken(backend):
    rnn, inputs = make(backend)
    (wanted,) = torch.autograd.grad(rnn(*inputs)[0].sum(), rnn.weight_hh_l0)
    with saved_tensors_hooks(lambda t: (t.dtype, t.double()), lambda kept: kept[1].to(kept[0])):
        output = rnn(*inputs)[0]
    (found,) = torch.autograd.grad(output.sum(), rnn.weight_hh_l0)
    assert torch.equal(found, wanted)


def op_inputs(backend: str) -> dict[str, object]:
    w_ih, w_hh, b = (torch.randn(shape, dtype=EXACT) for shape in ((H, I), (H, H), (H,)))
    x, h_0 = torch.randn(T, B, I, dtype=EXACT), torch.randn(1, B, H, dtype=EXACT)
    lengths, reset = torch.tensor([7, 3, 5]), torch.zeros(T, B, dtype=torch.bool)
    options = (*Options(), backend)
    weights, states = Weights(w_ih, b, b, w_hh), States(h_0)
    inputs = x, *weights, *states, lengths, reset, None
    y, *_ = torch.ops.rnnfast.rnn(*inputs, *options)
    buffer = record.make(record.numbers(1, T, 1), x.device)
    given = {
        "grad_y": torch.randn_like(y), "grad_h": torch.randn_like(h_0), "grad_c": None,
        "grad_cells": None,
        "x": x, "y": y, **weights._replace(b_ih=None, b_hh=None)._asdict(), **states._asdict(),
        "lengths": lengths, "reset": reset, **Saved()._asdict(),
        "record": buffer, "dx": True, "dw": True,
    }  # fmt: skip
    return given | {f"option {i}": option for i, option in enumerate(options)}


@pytest.mark.parametrize("backend", KERNELS)
def test_the_op_refuses_what_its_kernel_would_misread(backend):
    """A compiled graph calls it with whatever the hooks of the graph's own saved tensors return."""
    given = op_inputs(backend)
    torch.ops.rnnfast.rnn_backward_recorded(*given.values())
    tensors = [name for name, x in given.items() if isinstance(x, Tensor)]
    assert len(tensors) == 10
    for name in tensors:
        for change in (*CHANGES.values(), lambda t: t.to(torch.complex64)):
            changed = change(given[name])
            if (changed.dtype, changed.shape, changed.device) == (
                given[name].dtype, given[name].shape, given[name].device,
            ):  # fmt: skip
                continue
            with pytest.raises(RuntimeError, match="given"):
                torch.ops.rnnfast.rnn_backward_recorded(*(given | {name: changed}).values())


@pytest.mark.parametrize("backend", KERNELS)
def test_a_record_that_moves_away_before_backward_is_refused(backend):
    given = op_inputs(backend)
    buffer = given["record"]
    for moved in (buffer.float(), buffer[:-1], buffer.to("meta")):
        with pytest.raises(RuntimeError, match=r"(record|track_gradient_flow): given"):
            torch.ops.rnnfast.rnn_backward_recorded(*(given | {"record": moved}).values())
