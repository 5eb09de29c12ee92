"""The record of a backward pass, and what can be read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import record
from . import reading, text
from .reading import NonFinite, Verdict


@dataclass(frozen=True, eq=False, repr=False)
class GradientFlow:
    """Per layer, direction and real time step, over the valid entries of the batch and all units:
    float64, [num_layers, num_directions, T], or [..., T, B] with track_gradient_flow="sample".

    A layer that got no gradient reads NaN, as does the gain of a step that no row has.
    """

    state_norm: Tensor  # of dh_t = dL/dh_t, before clipping
    carry_norm: Tensor  # of the part of it that came back through time
    clipped_norm: Tensor  # of dh_t after clipping
    preact_norm: Tensor  # of da_t, after clipping and layer norm
    state_max: Tensor  # largest |dh_t|, before clipping
    gain: Tensor  # mean of |f'|
    nonfinite_grad: Tensor  # how many entries of dh_t or da_t are not finite
    nonfinite_state: Tensor  # how many of h_t
    entries: Tensor  # how many there are: valid rows times units
    carried: Tensor  # how many of them the step after has sent a gradient back to
    network: Mapping = field(default_factory=dict)  # arguments of the RNN that it is of
    smallest: float = reading.SMALLEST  # norm that is still a measurement

    def fields(self) -> dict[str, Tensor]:
        """What was measured, by name."""
        return {name: getattr(self, name) for name in FIELDS}

    # ------------------------------------------------------------------------------- what it says

    @cached_property
    def factors(self) -> Tensor:
        """carry_norm_t / clipped_norm_{t+1}, shaped like the fields: what one step back through
        time makes of the gradient, whatever the loss adds on the way.

        At the step t that it comes back to; NaN where nothing comes back, where a reset stops some
        rows and not others (track_gradient_flow="sample" tells them apart), and where less than
        ``smallest`` was left: 1e-30, and in float16, whose range ends early, 1e-4. In the reverse
        direction the step after t is t - 1.
        """
        return reading.factors(
            self.carry_norm, self.clipped_norm, self.carried, self.entries, self.smallest
        )

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
        """Of each layer and direction, over all rows; the first that holds of

        | word | rests on |
        |---|---|
        | non-finite | an inf or NaN in a state or a gradient |
        | dead | ReLU whose gain is below 0.05 at half of the steps |
        | saturated | tanh, sigmoid: the mean of \\|f'\\| is below a tenth of its maximum |
        | exploding | log_growth over all steps multiplies the gradient by 1000 or more |
        | vanishing | by 1/1000 or less |
        | healthy | all else |
        | unknown | no gradient came to the layer, or no factor can be measured |
        """
        whole = self.pooled()
        return reading.judge(
            whole.log_growth,
            whole.gain,
            whole.entries,
            whole.nonfinite_state,
            whole.nonfinite_grad,
            self.network["nonlinearity"],
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of the verdicts, of the layer nearest to the input."""
        return reading.worst(self.verdicts)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to try against that; empty where it is healthy."""
        return reading.advice(self.verdict.word, self.network)

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """Where inf or NaN began: the first state of the lowest layer that has one, else the first
        gradient on the way back of the highest; None where all is finite."""
        whole = self.pooled()
        return reading.first_nonfinite(whole.nonfinite_state, whole.nonfinite_grad)

    # -------------------------------------------------------------------------------- of all rows

    def pooled(self) -> GradientFlow:
        """Of the batch, from a record of its rows; itself where it is one already."""
        if self.gain.dim() == 3:
            return self
        return replace(self, **_combined(self.fields()))

    def reduce(self, group=None) -> GradientFlow:
        """Of the mean of all ranks' losses, whose gradient DistributedDataParallel makes: norms are
        sqrt(sum of squares) / world size, state_max is the largest / world size, counts are sums.

        Every rank of the group calls it, and gets the same. T may differ from rank to rank.

        Raises:
            RuntimeError: torch.distributed is not initialized.
            ValueError: the ranks' records are not of the same number of layers and directions.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("reduce: torch.distributed is not initialized in this process")
        own = self.pooled()
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, own.fields(), group=group)
        return combine_ranks(gathered, self)

    # ------------------------------------------------------------------------------------- to see

    def __repr__(self) -> str:
        return text.as_text(self._title(), self._rows(), text.to_try(self.advice))

    def __rich__(self):
        return text.as_table(self._title(), self._rows(), text.to_try(self.advice))

    def _rows(self) -> list[tuple[str, ...]]:
        whole = self.pooled()
        T = whole.gain.shape[2]
        return text.rows_of(self.verdicts, whole.half_life, whole.horizon, whole.gain, T - 1)

    def _title(self) -> str:
        T = self.gain.shape[2]
        rows = f", {self.gain.shape[3]} rows apart" if self.gain.dim() == 4 else ""
        return f"Gradient flow over {T} time step{'s' if T > 1 else ''}{rows}"

    def plot(self):
        """A matplotlib.figure.Figure: for each layer and direction the norms over time, with
        half-life and horizon (all rows together). Its savefig writes a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install rnnfast[plots]``).
        """
        from .picture import draw_flow

        return draw_flow(self)

    def to_dict(self) -> dict:
        """All of it as JSON has it: lists for tensors, None for NaN, "inf" and "-inf"."""
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


def _combined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fields [L, D, T, N] of N parts of a batch as those of the whole. A part without gradient
    reads NaN, and so does the whole where all do."""
    entries = parts["entries"]
    missing = entries.isnan()

    def total(x: Tensor) -> Tensor:
        return torch.where(missing, 0, x).sum(-1)

    whole = {name: total(parts[name].square()).sqrt() for name in NORMS}
    whole["state_max"] = torch.where(missing, 0, parts["state_max"]).amax(-1)
    slopes = total(torch.where(entries > 0, parts["gain"] * entries, 0))
    whole["gain"] = slopes / total(entries)
    for name in ("nonfinite_grad", "nonfinite_state", "entries", "carried"):
        whole[name] = total(parts[name])
    return {name: torch.where(missing.all(-1), torch.nan, x) for name, x in whole.items()}


def side_by_side(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fields [L, D, T] of N records as [L, D, T, N], with steps that no row has up to the longest.

    Raises:
        ValueError: they are not of the same number of layers and directions.
    """
    if len({fields["gain"].shape[:2] for fields in parts}) != 1:
        shapes = [tuple(fields["gain"].shape) for fields in parts]
        raise ValueError(f"reduce: records [L, D, T] of shapes {shapes} are not of one network")
    T = max(fields["gain"].shape[2] for fields in parts)

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, T - x.shape[2]))

    return {name: torch.stack([padded(one[name]) for one in parts], -1) for name in FIELDS}


def combine_parts(parts: list[GradientFlow]) -> GradientFlow:
    """Of a batch, from the records of its parts, each of which had a backward pass of its own."""
    if len(parts) == 1:
        return parts[0].pooled()
    fields = [part.pooled().fields() for part in parts]
    return replace(parts[0], **_combined(side_by_side(fields)))


def combine_ranks(ranks: list[dict[str, Tensor] | None], of: GradientFlow) -> GradientFlow:
    """What :meth:`GradientFlow.reduce` makes of the fields of all ranks, of which ``of`` is one;
    None: it has none."""
    whole = _combined(side_by_side([fields for fields in ranks if fields is not None]))
    for name in (*NORMS, "state_max"):
        whole[name] = whole[name] / len(ranks)
    return replace(of, **whole, smallest=of.smallest / len(ranks))


def newest(buffers: list[list[Tensor]]) -> int:
    """The number of the backward pass that :func:`read` would read; record.NEVER: none."""
    numbers = [int(buffer[0]) for made in buffers for buffer in made]
    return max(numbers, default=record.NEVER)


def read(buffers: list[list[Tensor]], per_sample: bool, network: Mapping) -> GradientFlow | None:
    """Of the last backward pass that reached any of a module's layers; None where none has.

    A layer has several buffers where it needed more room. In one pass the first made was last.
    """
    found = [max(map(record.read, made), key=lambda one: one[0]) for made in buffers]
    last = max((task for task, *_ in found), default=record.NEVER)
    if last == record.NEVER:
        return None
    half, shape = next((half, values.shape) for task, half, values in found if task == last)
    nothing = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
    layers = [values.cpu() if task == last else nothing for task, _, values in found]
    values = torch.stack(layers)  # [L, D, T, N, fields]
    by_name = dict(zip(record.FIELDS, values.unbind(-1)))
    measured = {name: by_name.get(name) for name in FIELDS}
    for name in NORMS:
        measured[name] = by_name[name.replace("norm", "squares")].sqrt()
    measured["gain"] = by_name["slopes"] / by_name["entries"]
    if not per_sample:
        measured = {name: x.squeeze(-1) for name, x in measured.items()}
    smallest = reading.SMALLEST_HALF if half else reading.SMALLEST
    return GradientFlow(**measured, network=network, smallest=smallest)
