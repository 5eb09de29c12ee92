"""The record of a backward pass, and the numbers that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..extras import need
from ..recurrence import record
from . import reading, text
from .reading import NonFinite, Verdict
from .sums import SQUARES, Sums, measured, take, together

if TYPE_CHECKING:
    from ..cells.cell import Cell
    from ..drawing import Picture


class Memory(NamedTuple):
    """Norms of the gradient of the state that carries the memory, shaped like the fields."""

    norm: Tensor  # of the whole gradient
    carry: Tensor  # of the part that came back from the step after
    sent: Tensor  # of the gradient that the step sends on, after clipping


@dataclass(frozen=True, eq=False, repr=False)
class GradientFlow:
    """The gradient of each layer and direction at each real time step, over the valid entries of
    the batch and all units.

    Fields are float64, [num_layers, num_directions, T], or [..., T, B] with
    track_gradient_flow="sample". A layer that got no gradient reads NaN. So does the gain of a step
    that no row has.
    """

    state_norm: Tensor  # norm of dh_t = dL/dh_t, of an LSTM (dh_t, dc_t), before clipping
    carry_norm: Tensor  # norm of its part that came back through time
    clipped_norm: Tensor  # its norm after clipping
    preact_norm: Tensor  # norm of da_t, after clipping and layer norm
    state_max: Tensor  # its largest magnitude, before clipping
    gain: Tensor  # mean of |f'|; of the forget gate f of an LSTM, of z of a GRU
    nonfinite_grad: Tensor  # number of units whose gradients are not all finite
    nonfinite_state: Tensor  # number of entries of h_t that are not finite
    entries: Tensor  # number of entries: valid rows times units
    carried: Tensor  # number of entries to which the step after has sent a gradient back
    cell_norm: Tensor  # norm of dL/dc_t, also through h_t, after clipping; 0 in a cell without c
    cell_carry_norm: Tensor  # norm of its part that came back from the step after
    network: Mapping = field(default_factory=dict)  # arguments of the module, and its "cell"
    smallest: float = reading.SMALLEST  # a smaller norm is no measurement

    def fields(self) -> dict[str, Tensor]:
        """The measured tensors, by name."""
        return {name: getattr(self, name) for name in FIELDS}

    # ------------------------------------------------------------------------------- what it says

    @cached_property
    def factors(self) -> Tensor:
        """carry_norm_t / clipped_norm_{t+1}, shaped like the fields: one step back through time
        multiplies the norm of the gradient by this number. The loss adds its part at step t later.
        The memory of an LSTM is c, so its factors are cell_carry_norm_t / cell_norm_{t+1}: what the
        loss adds to dh_t at each step would hide the decay of dc_t.

        A factor is NaN where no gradient comes back to step t, where a reset stops some rows and
        not others (track_gradient_flow="sample" keeps rows apart), and where the norm at the step
        after t is below ``smallest``: 1e-30, or 1e-4 in float16, whose range ends early. In the
        reverse direction the step after t is t - 1.
        """
        memory = self.memory
        return reading.factors(memory.carry, memory.sent, self.carried, self.entries, self.smallest)

    @property
    def memory(self) -> Memory:
        """The norms whose ratio is the factor: those of c, or those of h in a cell without c."""
        if len(self.cell.states) > 1:
            return Memory(self.cell_norm, self.cell_carry_norm, self.cell_norm)
        return Memory(self.state_norm, self.carry_norm, self.clipped_norm)

    @property
    def cell(self) -> Cell:
        """The cell of the network: what its states and its gain are."""
        return reading.cell_of(self.network)

    @cached_property
    def log_growth(self) -> Tensor:
        """Mean natural logarithm of the factors, per step: [L, D], or [L, D, B]."""
        return reading.mean_log(self.factors, 2)

    @cached_property
    def half_life(self) -> Tensor:
        """Steps back through time until half of the gradient is left, ln 2 / -log_growth: [L, D],
        or [L, D, B]. Infinite where it does not decay."""
        return reading.half_life(self.log_growth)

    @cached_property
    def horizon(self) -> Tensor:
        """Steps back from the last with a gradient until the product of factors is 1/1000: [L, D],
        or [L, D, B]. Infinite where it stays above; an edge of bptt_window ends it."""
        both = (self.entries > 0) & (reading.step_after(self.entries) > 0)
        stopped = both & (self.carried == 0)
        return reading.horizon(self.factors, stopped)

    @cached_property
    def verdicts(self) -> list[list[Verdict]]:
        """The verdict on each layer and direction, over all rows: the first row of this table that
        holds. Growth is exp(log_growth) over all steps.

        | word | rests on |
        |---|---|
        | non-finite | an inf or NaN in a state or a gradient |
        | exploding | growth is 1000 or more |
        | dead | growth is 1/1000 or less; the gain of a ReLU is below 0.05 at half of the steps |
        | saturated | growth is 1/1000 or less; the gain is below a tenth of the largest slope |
        | vanishing | growth is 1/1000 or less, and neither cause shows, or the cell has gates |
        | healthy | none of these |
        | unknown | no gradient came to the layer, or no factor can be measured |
        """
        whole = self.pooled()
        return reading.judge(
            whole.log_growth,
            whole.gain,
            whole.entries,
            whole.nonfinite_state,
            whole.nonfinite_grad,
            self.cell,
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of the verdicts; among equals, that of the layer nearest to the input."""
        return reading.worst(self.verdicts)

    @property
    def advice(self) -> tuple[str, ...]:
        """Remedies for the verdict; empty where it is healthy."""
        return reading.advice(self.verdict.word, self.network)

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """The place where inf or NaN began: the first such state in the lowest layer that has one;
        without such a state, the gradient that backward reached first, in the highest layer. None
        where all is finite."""
        whole = self.pooled()
        return reading.first_nonfinite(whole.nonfinite_state, whole.nonfinite_grad)

    # -------------------------------------------------------------------------- rows put together

    def pooled(self) -> GradientFlow:
        """The record of the whole batch, from a record that keeps rows apart; self where it is one
        already."""
        if self.gain.dim() == 3:
            return self
        whole = _sums(self.fields(), self.smallest).pooled().values
        return replace(self, **measured(whole.squeeze(3)))

    def reduce(self, group=None) -> GradientFlow:
        """The record of all ranks together, whose loss is the mean of the ranks' losses, as
        DistributedDataParallel's is: norms are sqrt(sum of squares) / world size, state_max is the
        largest / world size, counts are sums.

        Every rank of the group calls it, and gets the same. T may differ from rank to rank.

        Raises:
            RuntimeError: torch.distributed is not initialized.
            ValueError: the numbers of layers or directions differ from rank to rank.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("reduce: torch.distributed is not initialized in this process")
        own = self.pooled()
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, own.fields(), group=group)
        return combine_ranks(gathered, self)

    # ------------------------------------------------------------------------- text and a picture

    def __repr__(self) -> str:
        notes = text.to_try(self.advice)
        return text.as_text(self._title(), self._rows(), notes, self.cell.gain_name)

    def __rich__(self):
        notes = text.to_try(self.advice)
        return text.as_table(self._title(), self._rows(), notes, self.cell.gain_name)

    def _rows(self) -> list[tuple[str, ...]]:
        whole = self.pooled()
        T = whole.gain.shape[2]
        return text.rows_of(self.verdicts, whole.half_life, whole.horizon, whole.gain, T - 1)

    def _title(self) -> str:
        T = self.gain.shape[2]
        rows = f", {self.gain.shape[3]} rows apart" if self.gain.dim() == 4 else ""
        return f"Gradient flow over {T} time step{'s' if T > 1 else ''}{rows}"

    def plot(self) -> Picture:
        """A matplotlib.figure.Figure: for each layer and direction the norms over time, with
        half-life and horizon, all rows together. A notebook shows it; savefig(path) writes a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install rnnfast[plots]``).
        """
        need("matplotlib", "plots", "plot()")
        from .picture import draw_flow

        return draw_flow(self)

    def to_dict(self) -> dict:
        """All numbers and words as JSON takes them: lists for tensors, None for NaN, "inf" and
        "-inf"."""
        return text.plain(
            {
                "network": dict(self.network),
                "half_life": self.half_life,
                "horizon": self.horizon,
                "log_growth": self.log_growth,
                "verdicts": [[v._asdict() for v in layer] for layer in self.verdicts],
                "advice": self.advice,
                "first_nonfinite": self.first_nonfinite and self.first_nonfinite._asdict(),
                "fields": self.fields(),
            }
        )


FIELDS = tuple(f.name for f in fields(GradientFlow) if f.name not in ("network", "smallest"))
NORMS = tuple(name for name in FIELDS if name.endswith("_norm"))


def _sums(fields: Mapping[str, Tensor], smallest: float) -> Sums:
    """The sums behind fields [L, D, T] or [L, D, T, B]."""
    entries = fields["entries"]
    by_name = {name: fields.get(name) for name in record.FIELDS}
    for name in SQUARES:
        by_name[name] = fields[name.replace("squares", "norm")].square()
    # Without entries the gain is NaN and the sum of slopes is 0. A layer without gradient has NaN.
    by_name["slopes"] = torch.where(entries == 0, 0, fields["gain"] * entries)
    values = torch.stack([by_name[name] for name in record.FIELDS], -1)
    return Sums(values if values.dim() == 5 else values.unsqueeze(3), smallest)


def combine_ranks(ranks: list[dict[str, Tensor] | None], of: GradientFlow) -> GradientFlow:
    """:meth:`GradientFlow.reduce`, from the fields of all ranks.

    Args:
        ranks: None for a rank without a record.
        of: the record of one rank.
    """
    parts = [_sums(fields, of.smallest) for fields in ranks if fields is not None]
    whole = together(parts).over(len(ranks))
    return replace(of, **measured(whole.values.squeeze(3)), smallest=whole.smallest)


def read(buffers: list[list[Tensor]], per_sample: bool, network: Mapping) -> GradientFlow | None:
    """The record of the last backward pass through a module; None before the first.

    Args:
        buffers: for each layer those of :mod:`rnnfast.recurrence.record`.
        per_sample: keeps the rows of the batch apart.
        network: arguments of the module.
    """
    found = take(buffers)
    if found is None:
        return None
    values = found.values if per_sample else found.pooled().values.squeeze(3)
    return GradientFlow(**measured(values), network=network, smallest=found.smallest)
