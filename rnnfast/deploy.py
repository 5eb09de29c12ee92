"""Decompositions for programs that run where rnnfast is not installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ops import eager_backward, eager_forward


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """For torch.export: the recurrence in torch's own ops, written out for each time step.

        table = torch.export.default_decompositions()
        table.update(rnnfast.decompositions())
        program = program.run_decompositions(table)

    The number of time steps is then fixed; the batch may stay dynamic.
    """
    return {
        torch.ops.rnnfast.rnn.default: _fixed(eager_forward, "x"),
        torch.ops.rnnfast.rnn_backward.default: _fixed(eager_backward, "y"),
    }


def _fixed(eager: Callable, steps_of: str) -> Callable:
    """``eager``, whose input of that name begins with the time steps."""
    op = torch.ops.rnnfast.rnn if steps_of == "x" else torch.ops.rnnfast.rnn_backward
    names = [argument.name for argument in op.default._schema.arguments]
    place = names.index(steps_of)

    def unrolled(*inputs):
        if isinstance(inputs[place].shape[0], torch.SymInt):
            raise RuntimeError(
                "rnnfast.decompositions: given a dynamic number of time steps, wanted a fixed one, "
                "which is unrolled: leave that axis out of dynamic_shapes"
            )
        return eager(*inputs)

    return unrolled
