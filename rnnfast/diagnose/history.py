"""The history of one RNN over a training: numbers for each step, and maps of the norms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..gradient_flow import reading
from ..gradient_flow.flow import GradientFlow
from ..gradient_flow.sums import Pass, measured, side_by_side, together

BLOCK = 64  # records read at once; one takes nearly as long
Field = Literal["carry_norm", "state_norm"]
MAPS = get_args(Field)
LARGEST = torch.finfo(torch.float32).max


class Row(NamedTuple):
    """One layer and direction at one training step."""

    step: int  # steps of the optimizer, this one included
    rnn: str  # its name in the model
    layer: int
    direction: int  # 1: reverse
    passes: int  # backward passes in the step
    skipped: bool  # the GradScaler left the optimizer's step out
    time_steps: int  # those that any row of the batch has; 0: no gradient came to the layer
    half_life: float  # as in GradientFlow
    horizon: float
    log_growth: float
    gain: float  # mean over the time steps
    state_norm_first: float  # at the first time step
    state_norm_last: float
    nonfinite_grad: int
    nonfinite_state: int
    first_nonfinite: str  # the place in the RNN, in words; empty where all is finite
    verdict: str
    evidence: str


class Entry(NamedTuple):
    """The records of one training step."""

    step: int
    passes: int
    skipped: bool
    parts: list[Pass]  # one for each part of the batch


class History:
    """The history of one RNN.

    Args:
        name: of the RNN in its model.
        network: arguments of the RNN.
        first: the first training step that is recorded.
        every: one of so many training steps is recorded.
        keep: columns of the maps, at most. A longer training drops every second column, again and
            again, so that the maps cover all of it. The numbers of each step stay.
    """

    def __init__(self, name: str, network: Mapping, first: int, every: int, keep: int) -> None:
        self.name, self.network, self.first, self.keep = name, network, first, keep
        self.cell = reading.cell_of(network)
        self.width = every  # training steps to a column
        self.maps: dict[int, Tensor] = {}  # by training step: [MAPS, L, D, T], float32
        self.nonfinite: list[int] = []  # training steps with inf or NaN
        self._waiting: list[Entry] = []
        self._blocks: list[_Block] = []

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        if len(self._waiting) == BLOCK:
            self.read()

    def read(self) -> Iterator[Row]:
        """Reads the entries that wait, and returns their rows."""
        entries, self._waiting = self._waiting, []
        if not entries:
            return iter(())
        sums = side_by_side([together([p.sums() for p in entry.parts]) for entry in entries])
        fields = measured(sums.values)  # [L, D, T, S]
        whole = GradientFlow(**fields, network=self.network, smallest=sums.smallest)
        block = _Block(self.name, entries, whole)
        self._blocks.append(block)
        self.nonfinite += [entry.step for entry, bad in zip(entries, block.nonfinite) if bad]
        self.maps |= zip((entry.step for entry in entries), _maps(whole))
        while (entries[-1].step - self.first) // self.width >= self.keep:
            self.width *= 2
            kept = [step for step in self.maps if (step - self.first) % self.width == 0]
            self.maps = {step: self.maps[step] for step in kept}
        return block.rows()

    def rows(self) -> Iterator[Row]:
        """The rows of all recorded steps."""
        self.read()
        return itertools.chain.from_iterable(block.rows() for block in self._blocks)


def _maps(whole: GradientFlow) -> list[Tensor]:
    """For each of S records the norms [MAPS, L, D, T]: inf where a value is not finite, NaN where
    no row has the step, or no gradient can come back to it."""
    there = whole.entries > 0
    bad = whole.nonfinite_grad + whole.nonfinite_state > 0
    norms = torch.stack([whole.carry_norm, whole.state_norm])
    norms = torch.where(bad, torch.inf, norms.clamp(max=LARGEST))
    norms = torch.where(torch.stack([there & (whole.carried > 0), there]), norms, torch.nan)
    return [x.float() for x in norms.unbind(-1)]


class _Block:
    """The numbers of entries that were read together."""

    def __init__(self, name: str, entries: list[Entry], whole: GradientFlow) -> None:
        self.name = name
        self.labels = [(entry.step, entry.passes, entry.skipped) for entry in entries]
        self.cell = whole.cell
        there = whole.entries > 0
        steps = there.sum(2)
        last = (steps - 1).clamp(min=0).unsqueeze(2)
        gain = torch.where(there, whole.gain, 0)
        self.numbers = {  # [L, D, S]
            "time_steps": steps,
            "half_life": whole.half_life,
            "horizon": whole.horizon,
            "log_growth": whole.log_growth,
            "gain": gain.sum(2) / steps,
            "idle": (there & (gain < reading.DEAD)).sum(2) / steps,
            "state_norm_first": whole.state_norm[:, :, 0].clone(),  # a view would keep all of it
            "state_norm_last": whole.state_norm.gather(2, last).squeeze(2),
            "nonfinite_grad": whole.nonfinite_grad.nansum(2).long(),
            "nonfinite_state": whole.nonfinite_state.nansum(2).long(),
        }
        bad = (self.numbers["nonfinite_grad"] + self.numbers["nonfinite_state"]).sum((0, 1)) > 0
        self.nonfinite = [
            reading.first_nonfinite(whole.nonfinite_state[..., i], whole.nonfinite_grad[..., i])
            if is_bad
            else None
            for i, is_bad in enumerate(bad.tolist())
        ]

    def rows(self) -> Iterator[Row]:
        values = {column: x.tolist() for column, x in self.numbers.items()}
        L, D, S = self.numbers["gain"].shape
        for i, layer, d in itertools.product(range(S), range(L), range(D)):
            step, passes, skipped = self.labels[i]
            bad = self.nonfinite[i]
            here = {column: x[layer][d][i] for column, x in values.items()}
            word, evidence = reading.judge_one(
                here["log_growth"],
                here["time_steps"],
                here["gain"],
                here.pop("idle"),
                here["nonfinite_state"],
                here["nonfinite_grad"],
                bad,
                self.cell,
            )
            yield Row(
                step,
                self.name,
                layer,
                d,
                passes,
                skipped,
                **here,
                first_nonfinite=reading.in_words(bad) if bad else "",
                verdict=word,
                evidence=evidence,
            )
