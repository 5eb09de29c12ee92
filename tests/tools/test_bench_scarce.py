"""The benchmark where cores are scarce."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

from rnnfast import cores
from rnnfast.__main__ import parser
from rnnfast.backends import cpu
from rnnfast.bench import command, providers, scarce, table, timing
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


def bench(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(timing.GEMM_SIZE, "cpu", 64)
    words = ["bench", "--points", "2,3,4", "--seconds-per-workload", "0.001", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        command.run(parser().parse_args([*words, "--out", str(tmp_path)]), [TorchRNN()])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("average", [0.5, 7.25])
def test_a_busy_machine_is_named_before_the_run_and_after_it(
    average, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (average, 0.0, 0.0))
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 2)
    bench(tmp_path, monkeypatch)
    said = capsys.readouterr()
    for text in (said.err, " ".join(said.out.split())):
        assert "WARNING: this machine was busy before the benchmark began" in text
        assert f"load average {average:.2f} on 2 CPUs" in text


def test_the_load_of_an_idle_machine_is_no_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (0.2, 9.0, 9.0))
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 1)
    bench(tmp_path, monkeypatch)
    said = capsys.readouterr()
    assert "WARNING" not in said.out + said.err
    assert "at the start: load average 0.20 on 1 CPU\n" in said.out


def test_a_system_without_a_load_average_is_measured_all_the_same(monkeypatch, tmp_path, capsys):
    def unknown():
        raise OSError

    monkeypatch.setattr(cores.os, "getloadavg", unknown)
    bench(tmp_path, monkeypatch)
    assert "load average" not in capsys.readouterr().out
