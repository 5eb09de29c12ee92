"""A line of the table: one backend, dtype, norm and group of options, with the worst result of all
its cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..testing import Verdict
from .sequences import Comparison

RECORD = "record."  # prefix of the names of its verdicts


@dataclass
class Row:
    backend: str
    dtype: str
    norm: str  # "none", "layer"
    group: str
    cell: str = "RNN"
    cases: int = 0
    seconds: float = 0.0
    steps: Verdict | None = None  # budget (ii)
    sequence: Comparison | None = None  # budget (i)
    record: Verdict | None = None
    record_error: float | None = None  # relative, over a whole sequence
    left_out: str = ""  # why the row, or a part of it, is left out
    case: str = ""  # the running case, in words
    complaints: list[str] = field(default_factory=list)  # each names the result and the case
    curves: dict = field(default_factory=dict)  # {result: {"ours", "theirs": [T]}}

    @property
    def word(self) -> str:
        return "FAILED" if self.complaints else "pass" if self.cases else "left out"

    @property
    def name(self) -> str:
        norm = ", layer norm" if self.norm == "layer" else ""
        return f"{self.backend}, {self.dtype}, {self.cell}{norm}, {self.group}"

    def begin(self, case: str) -> None:
        self.cases += 1
        self.case = case

    def complain(self, text: str) -> None:
        self.complaints.append(f"{text} ({self.case})" if self.case else text)

    def take_steps(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            kind = "record" if verdict.name.startswith(RECORD) else "steps"
            worst = getattr(self, kind)
            if worst is None or verdict.ratio > worst.ratio:
                setattr(self, kind, verdict)
            if not verdict.good:
                self.complain(str(verdict))

    def take_sequences(self, comparisons: Iterable[Comparison]) -> None:
        for comparison in comparisons:
            worst = self.sequence
            if worst is None or not comparison.ratio <= worst.ratio:  # NaN counts as worst
                self.sequence = comparison
            if not comparison.good:
                self.complain(str(comparison))

    def take_record_error(self, error: float, of: str, allowed: float) -> None:
        self.record_error = max(error, self.record_error or 0.0)
        if not error <= allowed:
            self.complain(f"{RECORD}{of}: relative error {error:.3g}, wanted {allowed:g}")

    def same_bits(self, runs: Sequence[dict[str, Tensor | None]]) -> None:
        """Compares two runs with the same inputs."""
        one, other = runs
        for name, x in one.items():
            if x is not None and not torch.equal(_bits(x), _bits(other[name])):
                self.complain(f"{name}: two runs with the same inputs give different bits")

    def to_dict(self) -> dict:
        """The row for validate.json."""
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "cell": self.cell,
            "norm": self.norm,
            "group": self.group,
            "cases": self.cases,
            "seconds": self.seconds,
            "result": self.word,
            "steps": self.steps and self.steps._asdict(),
            "sequence": self.sequence and self.sequence.to_dict(),
            "record": self.record and self.record._asdict(),
            "record_relative_error": self.record_error,
            "left_out": self.left_out,
            "complaints": self.complaints,
            "curves": self.curves,
        }


def _bits(x: Tensor) -> Tensor:
    """The bits: NaN equals itself, and -0 differs from 0."""
    return x.contiguous().view(torch.uint8)
