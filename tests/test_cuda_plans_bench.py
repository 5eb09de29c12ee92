"""`python -m bench.cuda_plans`: estimates of the CUDA kernels beside measurements."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from rnnfast.backends import cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import cuda_plans

pytest.importorskip("rnnfast._C")

H100 = cuda.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))


@pytest.fixture
def gpu(monkeypatch):
    """One whose kernels take twice what was estimated, forward, but streaming half of that."""
    monkeypatch.setattr(cuda, "KERNELS", cuda.EXTENSION)
    monkeypatch.setattr(cuda, "EMULATION", "")
    monkeypatch.setattr(cuda, "_device", lambda *_: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, **k))

    def seconds_of(size, plan, like):
        forward = plan.step * (1 if plan.streaming else 2) * cuda.STEPS / 1e6
        return forward, 3 * forward

    monkeypatch.setattr(cuda, "seconds_of", seconds_of)


def test_every_kernel_has_a_row_and_the_summary_says_how_far_off_it_is(gpu, tmp_path, capsys):
    words = ["--out", str(tmp_path / "new"), "--units", "64", "500", "4000", "--rows", "3"]
    assert cuda_plans.main(words) == 0
    with (tmp_path / "new/cuda-plans.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == cuda_plans.Row._fields
    bfloat16 = [row for row in rows if row["mode"] == "bfloat16" and row["norm"] == "False"]
    kernels = [row["kernel"] for row in bfloat16 if row["units"] == "500"]
    assert set(kernels) == {"cluster4", "cluster8", "cluster16", "streaming"}
    assert [row["kernel"] for row in bfloat16 if row["units"] == "4000"] == ["streaming"]
    for row in rows:
        off = 1 if row["kernel"] == "streaming" else 2
        assert float(row["forward"]) == pytest.approx(off * float(row["estimated"]), abs=2e-3)
    said = capsys.readouterr().out
    assert "2.00, 2.00, 2.00" in said
    assert "1.00, 1.00, 1.00" in said
    assert "the plan takes the fastest of them for " in said


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "EMULATION", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_plans.main([]) == 2
    assert "wanted a GPU" in capsys.readouterr().out
