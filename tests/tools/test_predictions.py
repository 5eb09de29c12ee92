"""docs/gpu_kernels.md: what is expected of the CUDA kernels beside what a GPU has shown."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from bench import cuda_plans, predictions

ROOT = Path(predictions.__file__).resolve().parents[1]
pytest.importorskip("rnnfast._C")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def page() -> str:
    return predictions.PAGE.read_text()


def measured(folder: Path, name: str, **row: object) -> None:
    folder = folder / name
    folder.mkdir()
    with (folder / "cuda-plans.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cuda_plans.Row._fields)
        writer.writeheader()
        writer.writerow(row)


ROW = {
    "mode": "bfloat16",
    "units": 512,
    "rows": 16,
    "norm": False,
    "kernel": "cluster16",
    "columns": 2,
    "of_units": 512,
    "estimated": "0.590",
    "forward": "1.234",
    "backward": "5.678",
}


def test_the_page_is_that_of_the_plan_and_the_results(page):
    assert predictions.with_tables(page, predictions.RESULTS) == page, "python -m bench.predictions"


def test_the_newest_measurement_stands_beside_its_prediction(page, tmp_path):
    measured(tmp_path, "gpu-check-nvidia-h200-2026-12-31T0000", **ROW)
    measured(tmp_path, "gpu-check-nvidia-a100-2027-01-01T0000", **ROW | {"forward": "2.5"})
    text = predictions.with_tables(page, tmp_path)
    assert "Measured: gpu-check-nvidia-a100-2027-01-01T0000." in text
    assert "→ **1.23**" not in text
    (of_model, of_plan) = (line for line in text.splitlines() if "→ **" in line)
    assert of_model.startswith("| 512 units, 16 blocks | 0.50 | ")
    assert of_model.count("→ **2.50**") == 1
    assert of_model.count("→ **5.68**") == 1
    assert of_plan.startswith("| bfloat16, 512 units | ")
    assert of_plan.count("→ **") == 1


def test_a_measurement_of_another_kernel_is_not_shown(page, tmp_path):
    measured(tmp_path, "gpu-check-nvidia-h200-2026-12-31T0000", **ROW | {"kernel": "streaming"})
    assert "→ **" not in predictions.with_tables(page, tmp_path)


def test_a_page_without_a_place_for_tables_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        predictions.with_tables("# kernels", predictions.RESULTS)


def test_as_a_command(page, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "page.md"
    copy.write_text(page)
    monkeypatch.setattr(sys, "argv", ["predictions", "--page", str(copy), "--results", "none"])
    assert predictions.main() == 0
    assert copy.read_text() == page
