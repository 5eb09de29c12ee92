"""The floating-point operations of the ops, for torch.utils.flop_counter: those of the products."""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from ..recurrence.groups import Rows, Saved, States, Weights

Shape = tuple[int, ...]
COUNTER = "torch.utils.flop_counter"
# Arguments of the backward op between y and dx_wanted.
_BEFORE_WANTED = sum(len(group._fields) for group in (Weights, States, Rows, Saved))


def forward(x: Shape, *shapes: Shape | None, **_) -> int:
    """x W_ih^T and h_{t-1} W_hh^T at every point [T, B]."""
    weights = Weights._make(shapes[: len(Weights._fields)])
    T, B, _ = x
    return 2 * T * B * (_numbers(weights.w_ih) + _numbers(weights.w_hh))


def backward(*inputs, **_) -> int:
    """dx, dW_ih and dW_hh where they are wanted, and da W_hh of every step but the first, which
    has it where the first state has a gradient."""
    y, *rest = inputs[3 + len(States._fields) :]
    weights = Weights._make(rest[: len(Weights._fields)])
    states = States._make(rest[len(weights) : len(weights) + len(States._fields)])
    dx_wanted, dw_wanted = rest[_BEFORE_WANTED : _BEFORE_WANTED + 2]
    T, B, _ = y
    projection, recurrence = 2 * B * _numbers(weights.w_ih), 2 * B * _numbers(weights.w_hh)
    carried = T - (states.h is None)
    return T * projection * (dx_wanted + dw_wanted) + recurrence * (carried + T * dw_wanted)


def backward_recorded(*inputs, **_) -> int:
    before = 4 + len(States._fields) + _BEFORE_WANTED
    return backward(*inputs[:before], *inputs[before + 1 :])


def _numbers(weight: Shape | None) -> int:
    return 0 if weight is None else math.prod(weight)


def register() -> None:
    """Now, or as soon as somebody imports the counter: it imports Triton, which takes longer than
    all of this package."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(counter: ModuleType) -> None:
    ops = torch.ops.rnnfast
    for op, formula in (
        (ops.rnn, forward),
        (ops.rnn_backward, backward),
        (ops.rnn_backward_recorded, backward_recorded),
    ):
        if op not in counter.flop_registry:  # of an earlier import of this package
            counter.register_flop_formula(op)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter as Python does, once, and has the formulas registered after it has run."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec
