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
    "rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor y, Tensor x, Tensor? w_ih, Tensor w_hh,"
    " Tensor? h_0, Tensor? lengths, bool dx_wanted, bool dw_wanted, str nonlinearity, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    return _with_empty(y, empty_gradients(y, x, w_ih, w_hh, h_0, dx_wanted, dw_wanted))


def _with_empty(like: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


_library.impl("rnn", _rnn, "CompositeExplicitAutograd")
_library.impl("rnn_backward", _rnn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rnnfast::rnn", _rnn_shapes, lib=_library)
torch.library.register_fake("rnnfast::rnn_backward", _rnn_backward_shapes, lib=_library)

_PLAIN = {Tensor, nn.Parameter, type(None)}


def _direct(*tensors: Tensor | None) -> bool:
    """Whether nobody looks at the ops: then the backend is called without the dispatcher, which
    takes a quarter of a small call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(x) in _PLAIN for x in tensors)
    )


def _batched(x: Tensor | None) -> bool:
    """By torch.autograd.grad(is_grads_batched=True), which is no transform of torch.func."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity, backend):
        y, h_n = _forward(x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity, backend)
        ctx.save_for_backward(y, x, w_ih, w_hh, h_0, lengths)
        ctx.nonlinearity, ctx.backend = nonlinearity, backend
        ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n):
        if grad_y is None and grad_h_n is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        dx_wanted, *dw_wanted = ctx.needs_input_grad[:5]
        inputs = (grad_y, grad_h_n, *saved, dx_wanted, any(dw_wanted), ctx.nonlinearity)
        if torch.is_grad_enabled() or in_transform():
            with precision.no_autocast(saved[0].device.type):
                dx, dw_ih, db, dw_hh, dh_0 = reference.backward(*inputs)
        elif _direct(grad_y, grad_h_n, *saved) and not _batched(grad_y) and not _batched(grad_h_n):
            dx, dw_ih, db, dw_hh, dh_0 = BACKENDS[ctx.backend].backward(*inputs)
        else:
            dx, dw_ih, db, dw_hh, dh_0 = torch.ops.rnnfast.rnn_backward(*inputs, ctx.backend)
        needs = ctx.needs_input_grad
        db_ih, db_hh = db.unbind() if needs[2] or needs[3] else (None, None)
        gradients = (dx, dw_ih, db_ih, db_hh, dw_hh, dh_0)
        return *(g if need else None for g, need in zip(gradients, needs)), None, None, None


def _forward(x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity, backend):
    inputs = (x, w_ih, b_ih, b_hh, w_hh, h_0, lengths, nonlinearity)
    if _direct(*inputs[:7]):
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
    if not torch.is_grad_enabled():
        return _forward(*inputs, backend)
    return (_apply if _direct(*inputs[:7]) else _Layer.apply)(*inputs, backend)


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    In these words torch.compile knows the answer as it traces.
    """
    return (
        torch._C._functorch.get_dynamic_layer_stack_depth() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
