"""The measurement of cures."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sklearn", "tqdm")),
    reason="the extras of the demo are not installed",
)


@pytest.mark.parametrize(
    "name", ["LSTM, torch's init", "GRU, chrono_steps=108", "tanh, batch norm"]
)
def test_a_network_is_trained_and_read(name):
    from bench.cures.__main__ import half_life, table
    from bench.cures.cures import CURES, run
    from rnnfast.demo.tasks import digits_then_noise

    cure = next(cure for cure in CURES if cure.name == name)
    outcome = run(cure, digits_then_noise(5, seed=0, epochs=1, quick=True), seed=0)
    assert 0 <= outcome.accuracy <= 1
    assert outcome.first != outcome.last
    lines = table({cure: [outcome, outcome]}).splitlines()
    assert len(lines) == 3
    assert f"| {name} | {outcome.accuracy:.0%} (" in lines[2]
    assert f"{half_life(outcome.first):.3g}" in lines[2] or outcome.first >= 0


def test_a_part_of_the_table_may_be_measured_again(tmp_path, monkeypatch):
    """The rows of all other remedies stay as they are, in the file and on the page."""
    from bench.cures import __main__ as command
    from bench.cures.cures import CURES, Outcome

    docs = Path(__file__).parents[2] / "docs"
    for name in ("cures.csv", "gradient_flow.md"):
        shutil.copy(docs / name, tmp_path)
    monkeypatch.setattr(
        command,
        "outcomes",
        lambda cures, *_: ((cure, Outcome(0.5, -0.1, 0.1)) for cure in cures for _ in range(3)),
    )
    monkeypatch.setattr(sys, "argv", ["cures", "--kinds", "gating", "--out", str(tmp_path)])
    command.main()
    for name, begins in (("cures.csv", "gating,"), ("gradient_flow.md", "| gating |")):
        old, new = (
            [
                line
                for line in (folder / name).read_text().splitlines()
                if not line.startswith((begins, "100 steps of noise"))
            ]
            for folder in (docs, tmp_path)
        )
        assert old == new
    measured = [cure.name for cure in CURES if cure.kind == "gating"]
    with (tmp_path / "cures.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "gating"]
    assert [row["network"] for row in rows] == [name for name in measured for _ in range(3)]
    assert {row["accuracy"] for row in rows} == {"0.5000"}
