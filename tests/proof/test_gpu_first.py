"""`make gpu-first` without a GPU: order, limits, budget, archive, and the run that goes on."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_check import __main__ as checking
from bench.gpu_check import driver, first
from bench.gpu_check.driver import Step

SEVEN_MINUTES = 420
NAMES = ["gpu", "build", "info", "judge", "first", "probe"]


def run(out: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "bench.gpu_check.first", "--dry-run"]
    command += ["--out", str(out), *words]
    return subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=60)


def states(folder: Path) -> dict[str, str]:
    results = json.loads((folder / "summary.json").read_text())
    return {step["name"]: step["state"] for step in results["steps"]}


def test_dry_run_takes_every_step_in_order_and_packs_one_archive(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    wanted = [*NAMES, *(step.name for step in checking.rest())]
    assert list(states(folder)) == wanted == [step.name for step in first.steps()]
    assert set(states(folder).values()) == {"ok"}
    archive = tmp_path / f"{folder.name}.tar.gz"
    with tarfile.open(archive) as packed:
        files = {Path(member.name).name for member in packed if member.isfile()}
    assert files == {"summary.txt", "summary.json", *(f"{name}.log" for name in wanted)}
    assert "nothing was tested" in done.stdout


def test_summary_fits_a_screen_and_names_the_largest_misses(tmp_path):
    lines = run(tmp_path).stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    (at,) = (i for i, line in enumerate(lines) if line.strip().startswith("MISS "))
    assert lines[at - 1].startswith("first ")


def test_budget_leaves_time_for_a_second_call():
    assert first.BUDGET_S < SEVEN_MINUTES
    most_valuable = first.steps()[: len(NAMES)]
    assert sum(step.limit_s for step in most_valuable) < first.BUDGET_S


def test_kernels_are_required_before_anything_is_judged():
    of = {step.name: step for step in first.steps()}
    assert of["build"].env["RNNFAST_CUDA"] == "1"
    assert of["judge"].env == {"RNNFAST_REQUIRE_GPU": "1"}


def test_judge_takes_every_kernel_and_mode_plain_and_with_all_options():
    """By the names of the tests that `make gpu-first` selects; here, without a GPU, none runs."""
    of = {step.name: step for step in first.steps()}
    words = list(of["judge"].words(sys.executable, "."))
    done = subprocess.run(
        [*words, "--collect-only", "-q"], cwd=gpu.ROOT, capture_output=True, text=True, timeout=60
    )
    names = [line for line in done.stdout.splitlines() if "test_every_kernel" in line]
    for kernel in ("streaming", "single_block", "cluster2", "cluster4", "cluster8", "cluster16"):
        for mode in ("bfloat16", "float16", "tf32", "exact"):
            for options in ("plain", "everything"):
                chosen = [n for n in names if f"[{kernel}-{mode}-" in n and f"-{options}]" in n]
                assert len(chosen) == 4, (kernel, mode, options)
    assert not [n for n in names if "clipped" in n]


def python(name: str, code: str, limit_s: float = 20, **options) -> Step:
    return Step(name, ("python", "-c", code), limit_s, **options)


def check(steps: list[Step], out: Path, budget: float = 60, resumes: bool = True) -> int:
    args = argparse.Namespace(out=out, budget=budget, dry_run=True)
    return driver.check("GPU first", steps, args, resumes=resumes)


@pytest.fixture(autouse=True)
def _results_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "committed")


def counting(name: str, mark: Path, then: str = "") -> Step:
    """Adds a line to a file each time it runs."""
    return python(name, f"open({str(mark)!r}, 'a').write({name!r} + ' '); {then}")


def test_second_run_goes_on_where_the_first_ended(tmp_path):
    mark, out = tmp_path / "mark", tmp_path / "out"
    begin = Step("begin", counting("begin", mark).command, 5, always=True)
    large = Step("large", counting("large", mark).command, 5000)
    good, broken = counting("good", mark), counting("broken", mark, "raise SystemExit(3)")
    assert check([begin, good, broken, large], out) == 1
    (folder,) = (f for f in out.iterdir() if f.is_dir())
    assert states(folder) == {"begin": "ok", "good": "ok", "broken": "failed", "large": "later"}
    mended = counting("broken", mark)
    small = Step("large", large.command, 5)
    assert check([begin, good, mended, small], out) == 0
    assert mark.read_text().split() == ["begin", "good", "broken", "begin", "broken", "large"]
    (same,) = (f for f in out.iterdir() if f.is_dir())
    assert same == folder
    assert set(states(folder).values()) == {"ok"}


def test_run_with_nothing_left_begins_another(tmp_path):
    mark = tmp_path / "mark"
    for _ in range(2):
        assert check([counting("one", mark)], tmp_path / "out") == 0
    assert mark.read_text().split() == ["one", "one"]
    assert check([counting("one", mark)], tmp_path / "out", resumes=False) == 0
    assert mark.read_text().split() == ["one"] * 3


def test_run_goes_on_from_results_that_were_committed(tmp_path, monkeypatch):
    """The machine of the second run is a new one: its results folder is empty."""
    mark = tmp_path / "mark"
    assert check([counting("one", mark), python("two", "raise SystemExit(1)")], gpu.RESULTS) == 1
    assert check([counting("one", mark), counting("two", mark)], tmp_path / "new") == 0
    assert mark.read_text().split() == ["one", "two"]
    (folder,) = (f for f in (tmp_path / "new").iterdir() if f.is_dir())
    assert (folder / "one.log").exists()


def test_a_crash_or_a_hang_costs_its_step_alone(tmp_path):
    steps = [
        python("crashes", "import os; os.abort()"),
        python("hangs", "import time; time.sleep(60)", 3),
        python("works", "print('done')"),
    ]
    args = argparse.Namespace(out=tmp_path, budget=26.5, dry_run=True)
    assert driver.check("GPU first", steps, args, resumes=True) == 1
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    assert states(folder) == {"crashes": "failed", "hangs": "timed out", "works": "ok"}


def test_summary_names_the_steps_that_ran_on_other_sources(tmp_path, monkeypatch, capsys):
    begin = Step("begin", python("begin", "").command, 5, always=True)
    for sources, code in (("old", "raise SystemExit(1)"), ("new", "")):
        monkeypatch.setattr(gpu, "sources", lambda sources=sources: sources)
        check([begin, python("kept", ""), python("mended", code)], tmp_path)
    assert "before the sources last changed: kept" in capsys.readouterr().out


def test_makefile_runs_it_with_the_python_that_was_named():
    command = ["make", "-n", "--no-print-directory", "gpu-first", "PYTHON=py", "RESULTS=r"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert shlex.split(done.stdout) == ["py", "-m", "bench.gpu_check.first", "--out", "r"]
