"""The benchmark where cores are scarce."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

from rnnfast.backends import cpu
from rnnfast.bench import providers, scarce, table
from rnnfast.bench.providers.torch_rnn import TorchRNN
from rnnfast.bench.runner import Runner
from rnnfast.bench.workload import BUSY, MANY


@pytest.mark.skipif(cpu._C is None, reason="the extension is not built")
def test_rnnfast_and_nn_rnn_are_timed_where_cores_are_scarce(monkeypatch):
    """With more threads than cores, and beside busy processes, which end with it."""
    monkeypatch.setattr(scarce, "SCARCE_POINT", (4, 3, 8))
    started = []

    class Process(subprocess.Popen):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(scarce.subprocess, "Popen", Process)
    threads = torch.get_num_threads()
    ours = next(p for p in providers.OURS if p.name == "rnnfast-cpu")
    found = scarce.measure(Runner([TorchRNN(), ours], 0.001, 3))
    assert torch.get_num_threads() == threads
    assert len(started) == cpu.cores()
    assert all(process.returncode for process in started)
    by_kind = {(row.kind, row.provider): row for row in found}
    assert set(by_kind) == {(k, p) for k in (MANY, BUSY) for p in ("torch", "rnnfast-cpu")}
    for kind, asked in ((MANY, 8 * cpu.cores()), (BUSY, threads)):
        row = by_kind[kind, "rnnfast-cpu"]
        assert row.threads == asked
        assert row.over_torch > 0
        slow = replace(row, over_torch=0.5)
        assert f"  (4, 3, 8), {kind} over torch: 0.50x of 0.97x" in table.summary([slow], {})
