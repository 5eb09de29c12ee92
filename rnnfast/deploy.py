"""Programs with ``rnnfast::rnn`` for machines where rnnfast cannot be installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ops import eager_backward, eager_forward


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """For torch.export: the recurrence in torch's own ops, one after another for each time step.

        table = torch.export.default_decompositions()
        table.update(rnnfast.decompositions())
        program = program.run_decompositions(table)

    The program has a fixed number of time steps then; the batch may stay dynamic.
    """
    return {
        torch.ops.rnnfast.rnn.default: _fixed(eager_forward, steps_of=0),
        torch.ops.rnnfast.rnn_backward.default: _fixed(eager_backward, steps_of=2),
    }


def _fixed(eager: Callable, steps_of: int) -> Callable:
    """``eager``, whose input number ``steps_of`` begins with the time steps."""

    def unrolled(*inputs):
        if isinstance(inputs[steps_of].shape[0], torch.SymInt):
            raise RuntimeError(
                "rnnfast.decompositions: given a dynamic number of time steps, wanted a fixed one, "
                "which is unrolled: leave that axis out of dynamic_shapes"
            )
        return eager(*inputs)

    return unrolled
