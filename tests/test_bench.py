"""What the benchmark writes, whom it refuses, what it says about bad arguments."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.ladder import call_cost, limits
from bench.rnn import options, points, report, timing
from bench.rnn.__main__ import ROOT, main, parse
from bench.rnn.providers import PROVIDERS, Layer, Module, Problem, make_problem, saved_bytes
from rnnfast.backends import cpu

TORCH, RNNFAST, _ = PROVIDERS
FAST = ["--seconds-per-point", "0.001", "--threads", "1"]

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


@pytest.fixture(autouse=True)
def _small_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Gemm.__init__, "__defaults__", (64,))


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Wrong(Module):
    """nn.RNN with one element of one result off."""

    def __init__(self, result: str) -> None:
        super().__init__("wrong", lambda H: nn.RNN(H, H))
        self.result = result

    def build(self, problem: Problem) -> Layer:
        layer = super().build(problem)

        def results() -> dict[str, torch.Tensor]:
            found = layer.results()
            found[self.result].view(-1)[-1] *= 1.001
            return found

        return layer._replace(results=results)


class Raises(Module):
    def build(self, problem: Problem) -> Layer:
        raise RuntimeError("no such kernel")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_cpu
def test_quick_run_writes_a_line_for_each_provider_and_a_picture(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.rnn", "--quick", "--out", str(tmp_path), *FAST],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("FAILED")) == (0, 0), done.stderr
    rows = read(tmp_path / "cpu.csv")
    assert {"cpu", "simd", "python", "torch", "jax", "rnnfast", "commit", "date"} <= set(rows[0])
    providers = {"torch", "rnnfast"} | ({"jax"} if importlib.util.find_spec("jax") else set())
    found = [(r["kind"], r["T"], r["B"], r["H"], r["what"], r["provider"]) for r in rows]
    assert sorted(found) == sorted(
        (p.kind, str(p.T), str(p.B), str(p.H), what, provider)
        for p in points.quick()
        for what in (points.FORWARD, points.BOTH)
        for provider in providers
    )
    for row in rows:
        assert 0 < float(row["p10_s"]) <= float(row["median_s"]) <= float(row["p90_s"])
        assert row["threads"] == "1"
        assert float(row["gemm_gflops"]) > 0
        assert row["saved_bytes"].isdigit() == (row["provider"] != "jax")
        if row["provider"] == "torch":
            assert float(row["over_torch"]) == 1
        judged = (row["provider"], row["what"]) == ("rnnfast", points.BOTH)
        assert bool(row["target_over_torch"]) == judged
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert f"of {len(points.quick()) * (len(providers) - 1)} targets reached" in done.stdout


@pytest.mark.parametrize("result", ["y", "h_n", "dx", "dw_ih", "dw_hh", "db_ih", "db_hh"])
def test_a_wrong_result_gets_no_time_and_exit_status_1(result, tmp_path, capsys):
    arguments = ["--points", "9,3,5", "--out", str(tmp_path), *FAST]
    assert main(arguments, [TORCH, Wrong(result)]) == 1
    assert {row["provider"] for row in read(tmp_path / "cpu.csv")} == {"torch"}
    name = {"dx": "dp"}.get(result, result)
    assert "FAILED: wrong at (9, 3, 5): wrong results, so no time." in (
        err := capsys.readouterr().err
    )
    assert f"{name}: " in err


def test_a_provider_that_raises_is_named_with_its_reason_and_the_run_goes_on(tmp_path, capsys):
    arguments = ["--points", "2,2,2", "3,1,4", "--out", str(tmp_path), *FAST]
    assert main(arguments, [Raises("odd", nn.RNN), TORCH]) == 1
    err = capsys.readouterr().err
    assert "FAILED: odd at (2, 2, 2): no such kernel" in err
    assert "FAILED: odd at (3, 1, 4): no such kernel" in err
    timed = {(row["T"], row["provider"]) for row in read(tmp_path / "cpu.csv")}
    assert timed == {("2", "torch"), ("3", "torch")}


def test_a_provider_that_is_not_there_is_left_out_with_its_reason(tmp_path, capsys):
    class Missing(Module):
        def unavailable(self) -> str:
            return "not installed here"

    arguments = ["--points", "2,2,2", "--out", str(tmp_path), *FAST]
    assert main(arguments, [Missing("rare", nn.RNN), TORCH]) == 0
    assert "rare is left out: not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--points", "1,2"], "--points: given '1,2', wanted T,B,H, each 1 or more"),
        (["--points", "1,0,3"], "--points: given '1,0,3', wanted T,B,H, each 1 or more"),
        (["--points", "1,x,3"], "--points: given '1,x,3', wanted T,B,H, each 1 or more"),
        (["--providers", "cudnn"], "--providers: invalid choice: 'cudnn'"),
        (["--seconds-per-point", "0"], "--seconds-per-point: given '0', wanted more than 0"),
        (["--seconds-per-point", "nan"], "--seconds-per-point: given 'nan', wanted more than 0"),
        (["--threads", "0"], "--threads: given '0', wanted 1 or more"),
        (["--out", __file__], "--out: cannot write to"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_argument_is_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_part_of_the_run_leaves_the_committed_results_alone():
    committed = ROOT / "bench" / "results"
    assert parse([], PROVIDERS).out == committed
    for part in (["--quick"], ["--points", "1,1,1"], ["--providers", "torch"]):
        assert parse(part, PROVIDERS).out != committed


def test_a_ratio_is_taken_round_by_round():
    """A machine that is twice as slow in some rounds is so for both."""
    ours, theirs = [1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 6.0, 3.0, 6.0, 3.0]
    assert timing.speed_up(theirs, ours) == 3


def test_every_candidate_has_a_sample_in_every_round_and_they_take_turns():
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = timing.take_turns(candidates, 0, rounds=4)
    assert len(samples["a"]) == len(samples["b"]) == 3
    turns = "".join(name for name, before in zip(calls, ["", *calls]) if name != before)
    assert turns == "ababab"  # first to see how long they take, then ab, ba, ab


def test_targets_name_what_was_missed():
    row = report.Row(
        *("listed", 128, 64, 512, points.BOTH, "rnnfast", 2, 0.2, 0.2, 0.2, 5),
        *(90.0, 100.0, 0.9, 1.1, 1.3, 1.2, 0),
    )
    lines = report.summary([row], scaling=1.5)
    assert lines[0] == "2 of 4 targets reached"
    assert "  (128, 64, 512) over torch: 1.10x of 1.20x" in lines
    assert "  (128, 64, 512), 1 thread to 2: 1.50x of 1.70x" in lines


def test_drawn_points_are_the_same_in_every_run():
    assert points.drawn(20) == points.drawn(20)
    assert len(set(points.drawn(20))) == 20


def test_saved_memory_counts_what_only_backward_needs():
    class Keeps(nn.Module):
        def forward(self, x):
            y = (x.exp() * 2).sin()  # exp keeps its result, sin its argument; 2 is no tensor
            return y, y

    x = make_problem(3, 2, 5).x.requires_grad_()
    assert saved_bytes(Keeps(), x) == 2 * 3 * 2 * 5 * 4


@needs_cpu
def test_rnnfast_keeps_nothing_but_its_output():
    assert RNNFAST.build(make_problem(5, 4, 8)).saved_bytes() == 0


# ----------------------------------------------------------------------- what the options cost


@needs_cpu
def test_options_are_timed_beside_the_loops_they_replace(tmp_path, capsys):
    arguments = ["--points", "4,2,8", "--seconds-per-point", "0.001", "--out", str(tmp_path)]
    assert options.main(arguments) == 0
    with open(tmp_path / "cpu_options.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == [*options.OPTIONS, *options.LOOPS]
    assert all(float(row["median_s"]) > 0 for row in rows)
    assert float(rows[0]["over_plain"]) == 1
    assert "layer norm" in capsys.readouterr().out


@needs_cpu
def test_no_time_for_a_loop_that_computes_something_else(monkeypatch):
    def without_norm(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.inputs(x) + 0 * self.state(x) + 0 * self.norm(x))
        return y, y[-1:]

    monkeypatch.setattr(options.Loop, "forward", without_norm)
    x, g = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 2, 8)
    with pytest.raises(RuntimeError, match=r"the kernel and the loop: .* differ by"):
        options.check(options.build(8), x, g)


@needs_cpu
def test_limits_tell_every_part(capsys):
    limits.main(["3,2,8", "--threads", "1"])
    said = capsys.readouterr().out
    assert said.startswith("(3, 2, 8), threads: 1;")
    assert all(f"| {part} |" in said for part in limits.PARTS)


@needs_cpu
def test_the_parts_of_a_short_call_can_be_called():
    for call in call_cost.calls(3, 2, 8).values():
        assert any(isinstance(x, torch.Tensor) for x in call())
