"""A layer, or its recurrence alone, as two opaque ops and one autograd.Function around them.

torch.compile sees ``rnnfast::rnn`` and ``rnnfast::rnn_backward``, never the kernels. What a kernel
does not define (second derivatives, forward mode, torch.func transforms) takes the formulas of
the reference, which PyTorch differentiates.

The input projection is inside: as operations of their own it and its gradients take longer to call
than a short sequence takes to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.library import Library

from . import precision
from .backends import BACKENDS, reference
from .backends.cpu import empty_gradients, empty_results

_library = Library("rnnfast", "DEF")
_library.define(
    "rnn(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor? b_hh, Tensor w_hh, Tensor? h_0,"
    " Tensor? lengths, str nonlinearity, str backend) -> (Tensor, Tensor)"
)
# An empty tensor in the place of a gradient that is not there, or not wanted.
_library.define(
    "rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor y, Tensor? x, Tensor? w_ih, Tensor w_hh,"
    " Tensor? h_0, Tensor? lengths, bool dx_wanted, bool dw_wanted, str nonlinearity, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _rnn(*inputs):
    *inputs, backend = inputs
    with torch._C._DisableAutocast():  # it leaks into op bodies
        return BACKENDS[backend].forward(*inputs)


def _rnn_backward(*inputs):
    *inputs, backend = inputs
    with torch._C._DisableAutocast():
        return _with_empty(inputs[2], BACKENDS[backend].backward(*inputs))


def _rnn_shapes(x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity, backend):
    return empty_results(x, w_hh)


def _rnn_backward_shapes(
    grad_y, grad_h_n, y, x, w_ih, w_hh, h_0, lengths, dx_wanted, dw_wanted, nonlinearity, backend
):
    return _with_empty(y, empty_gradients(y, w_ih, w_hh, h_0, dx_wanted, dw_wanted))


def _with_empty(like: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


_library.impl("rnn", _rnn, "CompositeExplicitAutograd")
_library.impl("rnn_backward", _rnn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rnnfast::rnn", _rnn_shapes, lib=_library)
torch.library.register_fake("rnnfast::rnn_backward", _rnn_backward_shapes, lib=_library)

_TYPES = {Tensor, nn.Parameter}
# What a tensor is, as the dispatcher sees it: memory on the CPU and nothing more. No wrapper of a
# transform, no pending negation, no zeros without memory.
with torch.inference_mode():
    _KEYS = {torch._C._dispatch_keys(torch.empty(0)).raw_repr()}
_KEYS.add(torch._C._dispatch_keys(torch.empty(0)).raw_repr())


def _direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher has nothing to do: then the backend is called without it, which saves
    a quarter of a small call."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    keys = torch._C._dispatch_keys
    return all(x is None or (type(x) in _TYPES and keys(x).raw_repr() in _KEYS) for x in tensors)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity, backend, direct):
        inputs = (x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity)
        y, h_n = _forward(inputs, backend, direct)
        kept = x if w_ih is not None and any(ctx.needs_input_grad[1:5]) else None
        ctx.save_for_backward(y, kept, w_ih, w_hh, h_0, lengths)
        ctx.nonlinearity, ctx.backend = nonlinearity, backend
        ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n):
        if grad_y is None and grad_h_n is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        needs = ctx.needs_input_grad
        inputs = (grad_y, grad_h_n, *saved, needs[0], any(needs[1:5]), ctx.nonlinearity)
        if torch.is_grad_enabled() or in_transform():
            with precision.no_autocast(saved[0].device.type):
                gradients = reference.backward(*inputs)
        elif _direct(grad_y, grad_h_n, *saved):
            gradients = BACKENDS[ctx.backend].backward(*inputs)
        else:
            gradients = torch.ops.rnnfast.rnn_backward(*inputs, ctx.backend)
        wanted = (g if need else None for g, need in zip(gradients, needs))
        return *wanted, None, None, None, None


def _forward(inputs: tuple, backend: str, direct: bool) -> tuple[Tensor, Tensor]:
    if direct:
        return BACKENDS[backend].forward(*inputs)
    return torch.ops.rnnfast.rnn(*inputs, backend)


# torch.autograd.Function.apply also unwraps what a finished transform has left behind, and looks
# for a setup_context; that takes longer than the call itself.
_apply = super(torch.autograd.Function, _Layer).apply


def layer(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [T, B, D * H] and h_n [D, B, H] of one layer, all its directions.

    Args:
        x: [T, B, I], or with w_ih None the input projection p [T, B, D * H].
        w_ih: [D * H, I] or None.
        b_ih, b_hh: [D * H] or both None.
        w_hh: [D, H, H]; or [H, H], D = 1.
        h_0: [D, B, H] or None for zeros.
        lengths: [B] int64 or None.
    """
    inputs = (x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity)
    if backend == "reference" or in_transform():
        with precision.no_autocast(x.device.type):
            return reference.forward(*inputs)
    direct = _direct(*inputs[:7])
    if not direct:
        _check_devices(*inputs[:6])
    if not torch.is_grad_enabled():
        return _forward(inputs, backend, direct)
    return (_apply if direct else _Layer.apply)(*inputs, backend, direct)


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """The dispatcher would take a "meta" weight for a call without values."""
    for value in others:
        if value is not None and value.device != x.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {value.device}"
            )


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    In these words torch.compile knows the answer as it traces.
    """
    return (
        torch._C._functorch.get_dynamic_layer_stack_depth() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
