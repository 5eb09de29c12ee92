"""The recurrence as two opaque ops and one autograd.Function around them.

torch.compile sees ``rnnfast::rnn`` and ``rnnfast::rnn_backward``, never the kernels. What a kernel
does not define (second derivatives, forward mode, torch.func transforms) takes the formulas of
:mod:`rnnfast.cells`, which PyTorch differentiates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from . import precision
from .backends import BACKENDS
from .backends.cpu import empty_rows
from .cells import rnn as cell

_library = Library("rnnfast", "DEF")
_library.define(
    "rnn(Tensor p, Tensor w_hh, Tensor? h_0, Tensor? lengths, str nonlinearity, str backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor y, Tensor w_hh, Tensor? h_0,"
    " Tensor? lengths, str nonlinearity, str backend) -> (Tensor, Tensor, Tensor)"
)


def _rnn(p, w_hh, h_0, lengths, nonlinearity, backend):
    with torch._C._DisableAutocast():  # it leaks into op bodies
        return BACKENDS[backend].forward(p, w_hh, h_0, lengths, nonlinearity)


def _rnn_backward(grad_y, grad_h_n, y, w_hh, h_0, lengths, nonlinearity, backend):
    with torch._C._DisableAutocast():
        return BACKENDS[backend].backward(grad_y, grad_h_n, y, w_hh, h_0, lengths, nonlinearity)


def _rnn_shapes(p, w_hh, h_0, lengths, nonlinearity, backend):
    D, H, _ = w_hh.shape
    return empty_rows(p, p.shape[2]), p.new_empty(D, p.shape[1], H)


def _rnn_backward_shapes(grad_y, grad_h_n, y, w_hh, h_0, lengths, nonlinearity, backend):
    D, H, _ = w_hh.shape
    return torch.empty_like(y), torch.empty_like(w_hh), y.new_empty(D, y.shape[1], H)


_library.impl("rnn", _rnn, "CompositeExplicitAutograd")
_library.impl("rnn_backward", _rnn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rnnfast::rnn", _rnn_shapes, lib=_library)
torch.library.register_fake("rnnfast::rnn_backward", _rnn_backward_shapes, lib=_library)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, w_hh, h_0, lengths, nonlinearity, backend):
        y, h_n = torch.ops.rnnfast.rnn(p, w_hh, h_0, lengths, nonlinearity, backend)
        ctx.save_for_backward(y, w_hh, h_0, lengths)
        ctx.nonlinearity, ctx.backend = nonlinearity, backend
        ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n):
        if grad_y is None and grad_h_n is None:
            return (None,) * 6
        y, w_hh, h_0, lengths = ctx.saved_tensors  # once: checkpointing allows no second look
        inputs = (grad_y, grad_h_n, y, w_hh, h_0, lengths, ctx.nonlinearity)
        if torch.is_grad_enabled() or in_transform():
            with precision.no_autocast(y.device.type):
                dp, dw_hh, dh_0 = cell.backward(*inputs)
        else:
            dp, dw_hh, dh_0 = torch.ops.rnnfast.rnn_backward(*inputs, ctx.backend)
        return dp, dw_hh, None if h_0 is None else dh_0, None, None, None


def recurrence(
    p: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [T, B, D * H] and h_n [D, B, H] from p [T, B, D * H], w_hh [D, H, H], h_0 [D, B, H]."""
    if backend == "reference" or in_transform():
        with precision.no_autocast(p.device.type):
            return cell.forward(p, w_hh, h_0, lengths, nonlinearity)
    return _Recurrence.apply(p, w_hh, h_0, lengths, nonlinearity, backend)


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    In these words torch.compile knows the answer as it traces.
    """
    return (
        torch._C._functorch.get_dynamic_layer_stack_depth() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
