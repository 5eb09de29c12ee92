"""`python -m bench.cuda_plans`: estimates of the CUDA kernels beside measurements."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import cuda_plans
from rnnfast.backends import cuda, cuda_clock, cuda_plan

pytest.importorskip("rnnfast._C")

H100 = cuda_plan.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))


@pytest.fixture
def gpu(monkeypatch):
    """One whose kernels take twice what was estimated, forward, but streaming half of that."""
    monkeypatch.setattr(cuda_plan, "KERNELS", cuda_plan.EXTENSION)
    monkeypatch.setattr(cuda_plan, "EMULATION", "")
    monkeypatch.setattr(cuda_plan, "device_of", lambda *_: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, **k))

    def times_of(size, plan, like):
        forward = plan.step * (1 if plan.streaming else 2) / 1e6
        return cuda_clock.Time(forward, 5e-6), cuda_clock.Time(3 * forward, 7e-6)

    monkeypatch.setattr(cuda, "times_of", times_of)


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
        assert (row["forward_call"], row["backward_call"]) == ("5.000", "7.000")
        assert row["cudnn_forward"] == ""
    said = capsys.readouterr().out
    assert "2.00, 2.00, 2.00" in said
    assert "1.00, 1.00, 1.00" in said
    assert "the plan takes the fastest of them for " in said


def test_first_sizes_are_two_dozen_and_stand_beside_cudnn(gpu, tmp_path, monkeypatch, capsys):
    layers = iter([2.0, 6.0, 5.0, 9.0] * len(cuda_plans.FIRST))
    monkeypatch.setattr(cuda_plans, "of_layers", lambda *_: tuple(next(layers) for _ in range(4)))
    assert len(cuda_plans.FIRST) == len(set(cuda_plans.FIRST)) == 24
    assert cuda_plans.main(["--first", "--out", str(tmp_path)]) == 0
    with (tmp_path / "cuda-first.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [
        (row["mode"], int(row["units"]), int(row["rows"]), row["norm"] == "True") for row in rows
    ]
    assert found == cuda_plans.FIRST
    for row in rows:  # nn.RNN has no layer norm
        assert row["cudnn_forward"] == ("" if row["norm"] == "True" else "5.000")
    *lines, last = capsys.readouterr().out.splitlines()
    assert (
        last
        == "cuDNN takes 2.00 times our step (median); at worst 1.50 (bfloat16 256 units 16 rows)"
    )
    assert len(lines) == 5
    assert all(
        line.startswith("MISS ") and " us a step forward, estimated " in line for line in lines
    )


def test_rows_are_on_disk_as_they_are_measured(gpu, tmp_path, monkeypatch):
    times_of, calls = cuda.times_of, []

    def third_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("an error of the GPU")
        return times_of(*arguments)

    monkeypatch.setattr(cuda, "times_of", third_fails)
    with pytest.raises(RuntimeError, match="an error of the GPU"):
        cuda_plans.main(["--out", str(tmp_path), "--units", "64", "500", "--rows", "3"])
    assert len((tmp_path / "cuda-plans.csv").read_text().splitlines()) == 3


def test_layers_are_timed_forward_and_backward(monkeypatch):
    """Here on the CPU, by its kernels: what is called, and that both lengths are."""
    made = cuda_plans.rnnfast.RNN
    monkeypatch.setattr(cuda_plans.rnnfast, "RNN", lambda *a, backend, **k: made(*a, **k))
    monkeypatch.setattr(cuda_clock, "LENGTHS", (2, 40))
    asked = []

    def timed(run, device):
        asked.append(run())
        return float(len(asked))

    monkeypatch.setattr(cuda_clock, "timed", timed)
    found = list(cuda_plans.of_layers("exact", 8, 3, torch.empty(0)))
    assert len(found) == 4
    outputs = [result[0] for result in asked if result is not None]
    assert {y.shape for y in outputs} == {(2, 3, 8), (40, 3, 8)}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_plan, "EMULATION", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_plans.main([]) == 2
    assert "wanted a GPU" in capsys.readouterr().out
