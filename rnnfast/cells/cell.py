"""The interface of a cell. The time loops, the judge and the record know no cell by its name.

Shapes: n heads, B batch, S units of a head. A state, a value of a gate and a saved value are
[n, B, S]; values of all gates are [G, n, B, S]; a parameter of the cell is [n, 1, S].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Tensors = tuple[Tensor, ...]


class StepGradients(NamedTuple):
    """The gradients of one step."""

    da: Tensor  # [G, n, B, S], of the pre-activations
    du: Tensor | None = None  # [G, n, B, S], of the recurrent part W_hh h + b_hh; None: da
    direct: Tensors = ()  # of each state before, beside the part through W_hh; (): 0
    parameters: Tensors = ()  # [n, B, S] of each parameter of the cell
    total: Tensor | None = None  # [n, B, S], of the second state, with its part through h


def _h(states: Tensors) -> Tensor:
    return states[0]


def _same(grad: Tensor, emitted: Tensor) -> Tensor:
    return grad


def _emitted_alone(emitted: Tensor, saved: Tensors) -> Tensors:
    return (emitted,)


def _nothing_saved(grads: Tensors, saved: Tensors) -> StepGradients:
    raise AssertionError("the cell saves no values")


class Cell(NamedTuple):
    """One cell. ``step`` has to be differentiable by PyTorch; ``step_back`` is its gradient from
    saved values, and is differentiable, too."""

    name: str
    gates: tuple[str, ...]  # rows of W_ih and W_hh, in torch's order
    states: tuple[str, ...]  # carried from step to step, fields of States, in order
    # (a [G, n, B, S], u, states before, parameters) -> states, saved. a = p + u, after a norm of
    # the sum; for a gate in `apart` it is p alone, and u is the recurrent part of all gates.
    step: Callable[[Tensor, Tensor, Tensors, Tensors], tuple[Tensors, Tensors]]
    # (gradient of each state, states before, emitted, saved, a, parameters) -> StepGradients. a:
    # the pre-activations from the values that a norm of the sum has saved; None without one.
    step_back: Callable[..., StepGradients]
    # (emitted, saved) -> [n, B, S] whose mean magnitude is the record's gain: how much of a state
    # comes straight through the step.
    gain: Callable[[Tensor, Tensors], Tensor]
    # Per unit, beside what is emitted. A cell that saves values computes in float32 at least, and
    # so carries its states.
    saved: tuple[str, ...] = ()
    # (gradient of each saved value, saved) -> StepGradients: a second derivative reaches them
    saved_back: Callable[[Tensors, Tensors], StepGradients] = _nothing_saved
    apart: tuple[str, ...] = ()  # gates whose recurrent part is not simply added to p
    parameters: tuple[str, ...] = ()  # [H] each
    norm: str = "sum"  # norm="layer" normalizes p + u ("sum") or u ("recurrent")
    emit: Callable[[Tensors], Tensor] = _h  # states -> what W_hh multiplies and y holds
    # (gradient of what was emitted, emitted) -> gradient of the first state
    emit_back: Callable[[Tensor, Tensor], Tensor] = _same
    # (emitted by the step before, saved by this one) -> states before
    states_before: Callable[[Tensor, Tensors], Tensors] = _emitted_alone
    # Whether step_back takes f' from a, where a norm has saved it and what was emitted is stored
    # in fewer bits.
    recomputes: bool = False
    gain_name: str = "|f'|"
    steepest: float | None = None  # the largest |f'| of a cell without gates
    idles: bool = False  # f' is 0 on one side: a unit can be dead

    @property
    def gated(self) -> bool:
        """Whether gates decide how much of a state stays. Their gain is the mean of such a gate."""
        return self.steepest is None

    @property
    def memory(self) -> str:
        """The state that carries the memory, whose gradient decays: c, or h without a c."""
        return self.states[-1]
