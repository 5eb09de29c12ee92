"""Clipping of the state gradient, as a step of the eager loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import CELLS
from ..cells.cell import Cell, Tensors
from ..tracing import constant


def clip(limit: float, *grads: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all states of a row and head [..., S], scaled by min(1, limit / norm) of
    all of them together; a norm that is inf or NaN scales by 1."""
    norms = [torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.float64) for g in grads]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    large = (norm > limit) & (norm < torch.inf)
    scale = limit / torch.where(large, norm, limit)
    return tuple(g * scale.to(g.dtype) for g in grads)


def clipped_step(
    cell: Cell, limit: float, a: Tensor, u: Tensor, before: Tensors, parameters: Tensors
) -> tuple[Tensors, Tensors]:
    """``cell.step``, whose states have their gradients clipped, as hooks on the states do it: in a
    second derivative, too."""
    if _is_pointwise(cell):
        function = _ClippedValueInTransform if in_transform() else _ClippedValue
        return (function.apply(a, cell.name, limit),), ()
    states, saved = cell.step(a, u, before, parameters)
    function = _ClippedInTransform if in_transform() else _Clipped
    return function.apply(limit, *states), saved


def _is_pointwise(cell: Cell) -> bool:
    """Whether the step is h = f(a), and f' is a function of h."""
    return len(cell.gates) == 1 and cell.states == ("h",) and not cell.saved and not cell.parameters


class _ClippedValue(torch.autograd.Function):
    """h = f(a). A reader of h in a first derivative sends its gradient through this clipping in a
    second one, and f' reads h."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, cell: str, limit: float) -> Tensor:
        (h,), _ = CELLS[cell].step(a, a, (), ())
        return h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.cell, ctx.limit = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        return _through(ctx.cell, *clip(ctx.limit, dh), h), None, None


def _through(cell: str, dh: Tensor, h: Tensor) -> Tensor:
    return CELLS[cell].step_back((dh,), (), h, (), None, ()).da


class _ClippedValueInTransform(_ClippedValue):
    """With forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _ClippedValue.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, da: Tensor, *_: None) -> Tensor:
        (h,) = ctx.saved_tensors
        return _through(ctx.cell, da[0], h)[0]


class _Clipped(torch.autograd.Function):
    """The states as they are; their gradients are clipped, in a second derivative, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(limit: float, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.clone() for s in states)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.limit = inputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *clip(ctx.limit, *grads)


class _ClippedInTransform(_Clipped):
    """With forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def jvp(ctx, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tangents)


@constant
def _is_transformed() -> bool:
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    In these words torch.compile knows the answer as it traces.
    """
    return _is_transformed() or torch.autograd.forward_ad._current_level >= 0
