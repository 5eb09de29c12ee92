"""The data of one layer, by name. Every part of the code passes these groups on whole.

Shapes: T time steps, B batch, D directions, G gates of the cell, H hidden size, n heads of
S = H / n units. Direction 1 runs in reverse real time.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The settings of a recurrence."""

    cell: str = "rnn_tanh"  # a key of rnnfast.cells.CELLS
    directions: int = 1
    heads: int = 1
    norm_eps: float = 1e-5
    bptt_window: int | None = None
    clip_state_grad: float | None = None
    per_sample: bool = False  # the record keeps the rows of the batch apart
    saves: bool = True  # forward returns what backward reads
    all_cells: bool = False  # forward returns the cell states of all steps


class Weights(NamedTuple):
    """The weights of a layer, all directions; or their gradients."""

    w_ih: Tensor | None  # [D * G * H, I]; None: the input is the projection p already
    b_ih: Tensor | None  # [D * G * H]
    b_hh: Tensor | None  # [D * G * H]
    w_hh: Tensor  # [D * G * H, S]: the rows of head k act on head k's slice of the state
    gamma: Tensor | None = None  # [D * G * H], float32 for narrower dtypes; None: no layer norm
    beta: Tensor | None = None  # like gamma
    cell_parameters: Tensor | None = None  # [D, k, H]: the k parameters of the cell itself


class States(NamedTuple):
    """The states of a cell before the first step or after the last; or their gradients. Each is
    [D, B, H]; None stands for zeros, and for a state that the cell does not have."""

    h: Tensor | None = None
    c: Tensor | None = None


class Rows(NamedTuple):
    """Which steps each row of the batch has."""

    lengths: Tensor | None = None  # [B] int64
    reset: Tensor | None = None  # [T, B] bool: nothing crosses the edge before that step


class Saved(NamedTuple):
    """Values that forward saves for backward beside y."""

    cell_values: Tensor | None = None  # [T, B, D * n * k * S]: the k values per unit of the cell
    ahat: Tensor | None = None  # [T, B, D * G * H]: the normalized pre-activations
    rstd: Tensor | None = None  # [T, B, D * n]


class Results(NamedTuple):
    """Results of forward."""

    y: Tensor  # [T, B, D * H]
    states: States
    saved: Saved
    cells: Tensor | None = None  # [T, B, D * H]: c of all steps, with Options.all_cells


class OutputGradients(NamedTuple):
    """The gradients that backward starts from."""

    y: Tensor | None  # [T, B, D * H]
    states: States
    cells: Tensor | None = None  # [T, B, D * H], at fixed y


class Kept(NamedTuple):
    """Tensors of the forward pass that backward reads."""

    x: Tensor | None  # [T, B, I]; None where dW_ih is not wanted
    y: Tensor
    weights: Weights
    states: States
    rows: Rows
    saved: Saved


class Wanted(NamedTuple):
    """The gradients that backward computes, beside those of the states."""

    x: bool = True
    weights: bool = True


class Gradients(NamedTuple):
    """Results of backward; None where there is no such input, or it is not wanted."""

    x: Tensor | None  # [T, B, I]; dp where there is no w_ih
    weights: Weights
    states: States


def in_head_order(x: Tensor, d: int, heads: int, S: int) -> Tensor:
    """Direction d of [B, D * heads * S] as [heads, B, S], by operations that is_grads_batched can
    map."""
    width = heads * S
    return x.narrow(1, d * width, width).reshape(x.shape[0], heads, S).transpose(0, 1)
