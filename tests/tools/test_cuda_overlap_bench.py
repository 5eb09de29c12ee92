"""`python -m bench.cuda_overlap`: layers one after another and side by side."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import cuda_overlap
from rnnfast.backends import cuda_plan
from rnnfast.modules import RNN, wavefront

pytest.importorskip("rnnfast._C")
WORDS = ["--layers", "2", "--units", "8", "--rows", "3", "--steps", "20"]


@pytest.fixture
def gpu(monkeypatch):
    """Stretches of four steps, on the CPU."""
    monkeypatch.setattr(cuda_plan, "KERNELS", cuda_plan.EXTENSION)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(wavefront, "ENABLED", False)
    monkeypatch.setattr(RNN, "_stretch", lambda *_: 4 if wavefront.ENABLED else 0)
    measure = cuda_overlap.measure
    monkeypatch.setattr(cuda_overlap, "measure", lambda _, sizes: measure("cpu", sizes, "cpu"))


def test_both_ways_are_timed(gpu, tmp_path, capsys):
    assert cuda_overlap.main(["--out", str(tmp_path / "new"), *WORDS]) == 0
    with (tmp_path / "new/cuda-overlap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == cuda_overlap.Row._fields
    assert [(row["what"], row["stretch"]) for row in rows] == [
        ("forward", "4"),
        ("forward+backward", "4"),
    ]
    assert all(float(row["apart"]) > 0 and float(row["together"]) > 0 for row in rows)
    assert "4 steps at a time" in capsys.readouterr().out


def test_other_numbers_are_a_failure(gpu, tmp_path, monkeypatch, capsys):
    run = wavefront.wavefront

    def off(*arguments):
        stretches, states = run(*arguments)
        return [y + 1 for y in stretches], states

    monkeypatch.setattr(wavefront, "wavefront", off)
    assert cuda_overlap.main(["--out", str(tmp_path), *WORDS]) == 1
    assert "FAILED: the results differ by" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_overlap.main([]) == 2
    assert "wanted a GPU" in capsys.readouterr().out
