"""The torch half of the GPU probe, run on the CPU: it measures what the plan says it does."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from bench.gpu_probe import __main__ as driver
from bench.gpu_probe import runner
from bench.gpu_probe.plan import PRECISIONS

pytest.importorskip("torch")


def peers(*arguments: str) -> runner.Outcome:
    return runner.run([sys.executable, "-m", "bench.gpu_probe.peers", *arguments], limit_s=120)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rnn_measures_each_cell_size_and_pass_as_called_and_queued(precision):
    small = ("--device", "cpu", "--steps", "3", "--hidden", "5", "8", "--batch", "1", "2")
    outcome = peers("rnn", "--precision", precision, *small)
    assert outcome.failures == []
    got = [(f["figure"], *f["params"].values()) for f in outcome.figures]
    wanted = itertools.product(
        ("torch_step", "torch_step_queued"),
        ("RNN", "LSTM"),
        (precision,),
        (5, 8),
        (1, 2),
        ("forward", "forward+backward"),
    )
    assert sorted(got) == sorted(wanted)
    for f in outcome.figures:
        assert list(f["params"]) == ["cell", "precision", "H", "B", "pass"]
        assert 0 < f["low"] <= f["value"] <= f["high"]
        assert f["unit"] == "us"


def test_gemm_measures_every_precision():
    outcome = peers("gemm", "--device", "cpu", "--size", "64")
    assert outcome.failures == []
    assert [f["params"]["precision"] for f in outcome.figures] == list(PRECISIONS)


def test_case_that_torch_refuses_is_named_and_the_rest_goes_on(monkeypatch, capsys):
    from bench.gpu_probe import peers as module

    def refuse(params, device, steps):
        if params["H"] == 5:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        module.emit("torch_step", params, [1.0], "us")

    monkeypatch.setattr(module, "_measure_rnn_case", refuse)
    module.measure_rnn("cpu", "bf16", 3, (5, 8), (1,))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["failed" in line for line in lines] == [True, False, True, False]
    assert "'H': 5" in lines[0]["failed"]
    assert "CUDNN_STATUS_NOT_SUPPORTED" in lines[0]["failed"]


def test_versions_are_one_json_object():
    command = [sys.executable, "-m", "bench.gpu_probe.peers", "versions"]
    done = subprocess.run(command, cwd=driver.ROOT, capture_output=True, text=True, timeout=120)
    assert {"python", "torch", "cuDNN"} <= json.loads(done.stdout).keys()
