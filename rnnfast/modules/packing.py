"""A PackedSequence: the layers run on a padded batch, and the output is packed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backends import torch_native
from ..functional import check_reset
from ..tracing import eager

if TYPE_CHECKING:
    from .stack import Hx, Stack


class Packing(NamedTuple):
    """Where the points of a PackedSequence are in a padded batch. Dropout draws for them alone."""

    batch_sizes: Tensor
    points: int  # the sum of batch_sizes
    rows: Tensor | None = None  # the place of each row in the sorted batch; None: it is sorted


@eager(
    "the sizes of a PackedSequence depend on the values of its lengths; rnnfast.RNN takes "
    "padded input with lengths= into a graph"
)
def run_packed(
    stack: Stack, packed: PackedSequence, hx: Hx | None, reset: Tensor | None
) -> tuple[Any, ...]:
    """The output, packed, and h_n; hx, reset [T, B] and h_n are in the order of the samples."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    stack._check(data, hx, batch_sizes)
    T, B = batch_sizes.numel(), int(batch_sizes[0])
    reset = check_reset(reset, (T, B), "[T, B]", data.device)
    if stack._backend(stack._problem(data, reset, B)) == "torch":
        if hx is None:
            hx = stack._zeros(data, batch_sizes[0])  # in a trace B would be a constant
        else:
            hx = stack.permute_hidden(hx, sorted_indices)
        options = stack._torch_options()
        output, h_n = torch_native.packed_layers(stack._cell(), data, hx, batch_sizes, options)
        cells = []
    else:
        output, h_n, *cells = _run_padded(stack, packed, hx, reset)
    output, *cells = (
        PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices) for y in (output, *cells)
    )
    return output, stack.permute_hidden(h_n, unsorted_indices), *cells


def _run_padded(
    stack: Stack, packed: PackedSequence, hx: Hx | None, reset: Tensor | None
) -> tuple[Any, ...]:
    """Pads the sequences, runs the layers, and packs the output. h_n is in the order of the
    packed batch, hx and reset in that of the samples."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    T = batch_sizes.numel()
    u, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, T)
    if stack.track_gradient_flow == "sample" and sorted_indices is not None:
        # The rows of the record are the samples in their own order.
        in_order = lengths[unsorted_indices.cpu()].to(data.device)
        packing = Packing(batch_sizes, data.shape[0], unsorted_indices)
        y, h_n, *cells = stack._layers(u[:, unsorted_indices], hx, in_order, reset, packing)
        y, *cells = (v[:, sorted_indices] for v in (y, *cells))
        h_n = stack.permute_hidden(h_n, sorted_indices)
    else:
        if sorted_indices is not None:
            hx = hx if hx is None else stack.permute_hidden(hx, sorted_indices)
            reset = reset if reset is None else reset[:, sorted_indices]
        packing = Packing(batch_sizes, data.shape[0])
        y, h_n, *cells = stack._layers(u, hx, lengths.to(data.device), reset, packing)
    output, *cells = (torch._VF._pack_padded_sequence(v, lengths, False)[0] for v in (y, *cells))
    return output, h_n, *cells
