"""The sums that backward left in the buffers of a module, and sums of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence import record
from ..values import has_values
from . import reading

SQUARES = tuple(name for name in record.FIELDS if name.endswith("squares"))
OF_SQUARES = [record.FIELDS.index(name) for name in SQUARES]
STATE_MAX, ENTRIES = map(record.FIELDS.index, ("state_max", "entries"))


class Sums(NamedTuple):
    """The sums of a backward pass, or of several."""

    values: Tensor  # float64 [L, D, T, N, record.FIELDS]; NaN for a layer without gradient
    smallest: float  # a smaller norm is no measurement

    def over(self, number: float) -> Sums:
        """The sums for the loss divided by ``number``."""
        if number == 1:
            return self
        values = self.values.clone()
        values[..., OF_SQUARES] /= number**2
        values[..., STATE_MAX] /= number
        return Sums(values, self.smallest / number)

    def pooled(self) -> Sums:
        """All N rows added up: N = 1."""
        return self if self.values.shape[3] == 1 else Sums(total(self.values), self.smallest)


Buffers = list[list[Tensor]]  # for each layer those of :mod:`rnnfast.recurrence.record`


def newest(buffers: Buffers) -> int:
    """The number of the backward pass that :func:`take` takes; record.NEVER before the first."""
    numbers = (record.number(buffer) for made in buffers for buffer in made)
    return max(numbers, default=record.NEVER)


class Pass(NamedTuple):
    """A copy of the buffers of a backward pass. A copy is quick to make, and can be read later."""

    replicas: list[Buffers]
    scale: float  # a factor of the loss

    @classmethod
    def of(cls, buffers: Buffers, scale: float) -> Pass:
        copies = [
            [[record.copy(max(made, key=record.number))] if made else [] for made in replica]
            for replica in by_device(buffers)
        ]
        return cls(copies, scale)

    def sums(self) -> Sums:
        return _joined(self.replicas).over(self.scale)


def take(buffers: Buffers) -> Sums | None:
    """The sums of the last backward pass through a module; None before the first."""
    return _joined(by_device(buffers))


def by_device(buffers: Buffers) -> list[Buffers]:
    """The buffers with values, those of each device for itself: a replica of nn.DataParallel has
    its own, for its part of the batch."""
    readable = [[b for b in made if has_values(b)] for made in buffers]
    devices = {b.device for made in readable for b in made}
    if len(devices) < 2:
        return [readable] if devices else []
    ordered = sorted(devices, key=lambda device: (device.type, device.index or 0))
    return [[[b for b in made if b.device == device] for made in readable] for device in ordered]


def _joined(replicas: list[Buffers]) -> Sums | None:
    """The rows of all replicas that the last backward pass reached; None before the first."""
    found = [(newest(replica), replica) for replica in replicas]
    last = max((number for number, _ in found), default=record.NEVER)
    if last == record.NEVER:
        return None
    parts = [_taken(replica, last) for number, replica in found if number == last]
    return parts[0] if len(parts) == 1 else side_by_side(parts)


def _taken(buffers: Buffers, last: int) -> Sums:
    """The sums of backward pass number ``last``.

    A layer that needed more room has several buffers. If one pass wrote several of them, the oldest
    counts: backward came to it last.
    """
    nothing = record.NEVER, False, torch.empty(0)
    found = [
        max(map(record.read, made), key=lambda one: one[0], default=nothing) for made in buffers
    ]
    half, shape = next((half, values.shape) for task, half, values in found if task == last)
    layers = [
        values.cpu()
        if task == last
        else torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for task, _, values in found
    ]
    smallest = reading.SMALLEST_HALF if half else reading.SMALLEST
    return Sums(torch.stack(layers), smallest)


def together(parts: list[Sums]) -> Sums:
    """The sums of a batch, from the sums of its parts. Each part had a backward pass of its own."""
    if len(parts) == 1:
        return parts[0].pooled()
    return side_by_side([part.pooled() for part in parts]).pooled()


def side_by_side(parts: list[Sums]) -> Sums:
    """The rows of all parts, filled up to the longest T with steps that no row has.

    Raises:
        ValueError: the numbers of layers or directions differ.
    """
    shapes = [tuple(part.values.shape[:3]) for part in parts]
    if len({shape[:2] for shape in shapes}) != 1:
        raise ValueError(f"records [L, D, T] of shapes {shapes} are not of one network")
    T = max(shape[2] for shape in shapes)
    padded = [
        x if x.shape[2] == T else F.pad(x, (0, 0, 0, 0, 0, T - x.shape[2]))
        for x in (part.values for part in parts)
    ]
    return Sums(torch.cat(padded, 3), max(part.smallest for part in parts))


def total(values: Tensor) -> Tensor:
    """N rows added up: [L, D, T, 1, fields]. Rows without gradient (NaN) are left out; the sum is
    NaN where all rows are."""
    missing = values[..., ENTRIES].isnan()
    known = torch.where(missing.unsqueeze(-1), 0, values)
    whole = known.sum(3, keepdim=True)
    if values.shape[3]:  # an empty batch has no largest, and its sums are 0
        whole[..., STATE_MAX] = known[..., STATE_MAX].amax(3, keepdim=True)
        whole[missing.all(3, keepdim=True)] = torch.nan
    return whole


def measured(values: Tensor) -> dict[str, Tensor]:
    """The fields of a GradientFlow, shaped like the sums without their last axis."""
    by_name = dict(zip(record.FIELDS, values.unbind(-1)))
    slopes = by_name.pop("slopes")
    for name in SQUARES:
        by_name[name.replace("squares", "norm")] = by_name.pop(name).sqrt()
    return by_name | {"gain": slopes / by_name["entries"]}
