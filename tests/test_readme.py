"""README.md holds the figures of bench/results, and none other."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import readme

ROOT = Path(__file__).parents[1]


def test_the_figures_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.with_figures(text, ROOT / "bench" / "results") == text, "python -m bench.readme"


def test_a_readme_without_a_place_for_figures_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.with_figures("# rnnfast", ROOT / "bench" / "results")
