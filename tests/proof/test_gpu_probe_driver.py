"""The GPU probe's driver, without a GPU: arguments, processes, time limits, report, dry run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_probe import __main__ as driver
from bench.gpu_probe import canned, plan, report, runner
from bench.gpu_probe.plan import Measurement, measurements

FIGURE = {"figure": "copy", "params": {"how": "x"}, "value": 4.25, "unit": "TB/s"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def probe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "bench.gpu_probe", *arguments]
    return subprocess.run(command, cwd=driver.ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    folder = tmp_path_factory.mktemp("dry") / "made" / "by it"
    done = probe("--dry-run", "--out", str(folder))
    (file,) = folder.iterdir()
    return done, json.loads(file.read_text())


# --- the dry run ---------------------------------------------------------------------------------


def test_dry_run_runs_the_whole_plan_and_succeeds(dry_run):
    done, results = dry_run
    assert done.returncode == 0, done.stderr
    assert [m["name"] for m in results["measurements"]] == [m.name for m in measurements()]
    assert all(m["ok"] for m in results["measurements"])
    assert results["failures"] == []
    assert {f["question"] for f in results["figures"]} == set(range(1, 9))


def test_dry_run_cannot_pass_for_a_measurement(dry_run):
    done, results = dry_run
    assert results["dry_run"] is True
    assert "Nothing here was measured" in done.stdout
    assert "canned" in results["machine"]["gpu"]


def test_every_figure_of_a_run_appears_in_its_report():
    """Each figure gets a value of its own, and every one of them must be printed."""
    results = _empty_results()
    shown = []
    for m in measurements():
        for f in canned.figures(m):
            if f["figure"] != "sm_clock":
                f["value"] = f["low"] = f["high"] = 1000 + len(shown)
                shown.append(str(f["value"]))
            results["figures"].append({"question": m.question, **f})
    numbers = re.findall(r"\d+", report.render(results))
    assert len(shown) > 1000
    assert set(shown) <= set(numbers)


def test_every_expectation_belongs_to_a_figure():
    figures = [f for m in measurements() for f in canned.figures(m)]
    for name, wanted, text in plan.ESTIMATES:
        matching = [f for f in figures if plan.estimate(f["figure"], f["params"]) == text]
        assert [f for f in matching if f["figure"] == name], (name, wanted, text)


def test_probes_canned_figures_and_tables_name_the_same_figures():
    sources = [*runner.SOURCES.glob("*.cu*"), Path(driver.__file__).parent / "peers.py"]
    pattern = r'(?:Figure|tag|emit)\("(\w+)"|\("(torch_step\w*)"'
    printed = {a or b for s in sources for a, b in re.findall(pattern, s.read_text())}
    assert printed - {"name"} == {f["figure"] for m in measurements() for f in canned.figures(m)}
    tables = {t.figure for tables in plan.TABLES.values() for t in tables}
    assert printed - {"name", "sm_clock"} == tables


def test_plan_names_each_process_once_and_limits_each():
    names = [m.name for m in measurements()]
    assert len(set(names)) == len(names)
    assert all(0 < m.limit_s <= 60 for m in measurements())
    assert {m.program for m in measurements()} == {*plan.PROGRAMS, "peers"}


def test_report_of_a_file_prints_what_the_run_printed(dry_run, tmp_path):
    done, results = dry_run
    file = tmp_path / "r.json"
    driver.write(file, results)
    assert json.loads(file.read_text()) == results
    again = probe("--report", str(file))
    assert again.returncode == 0
    assert again.stdout.strip() == done.stdout.strip()


# --- processes and their limits ------------------------------------------------------------------


def test_hanging_process_is_killed_at_its_limit_and_keeps_its_figures():
    code = f"import time; print({json.dumps(FIGURE)!r}, flush=True); time.sleep(60)"
    begin = time.monotonic()
    outcome = runner.run(python(code), limit_s=1)
    assert time.monotonic() - begin < 10
    assert outcome.figures == [FIGURE]
    assert outcome.failures == ["killed at its limit of 1 s"]


def test_children_of_a_killed_process_end_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time,pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}])"
    runner.run(python(code), limit_s=1)
    time.sleep(3)
    assert not mark.exists()


def test_crash_names_its_cause_and_keeps_the_figures():
    code = f"import sys; print({json.dumps(FIGURE)!r}); sys.exit('an illegal address')"
    outcome = runner.run(python(code), limit_s=10)
    assert outcome.figures == [FIGURE]
    assert outcome.failures == ["exit status 1: an illegal address"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("hello", "not JSON"),
        ("[1]", "not an object"),
        ('{"figure": "copy", "params": {}, "unit": "s"}', "no value"),
        (json.dumps(FIGURE | {"value": math.nan}), "not a finite number"),
        (json.dumps(FIGURE | {"low": "1"}), "not a finite number"),
        (json.dumps({"failed": "out of memory"}), "out of memory"),
        ("", "not JSON"),
    ],
)
def test_line_that_is_no_figure_is_a_failure(line, why):
    outcome = runner.run(python(f"print({json.dumps(FIGURE)!r}); print({line!r})"), limit_s=10)
    assert outcome.figures == [FIGURE]
    (failure,) = outcome.failures
    assert failure.startswith(why)


def test_process_without_a_figure_has_failed():
    assert runner.run(python(""), limit_s=10).failures == ["printed no figure"]


def test_one_failure_costs_only_itself_and_is_reported():
    codes = {
        "hangs": "import time; time.sleep(60)",
        "crashes": "raise SystemExit('boom')",
        "works": f"print({json.dumps(FIGURE)!r})",
    }
    results = _empty_results()
    todo = [Measurement(6, name, limit_s=1) for name in (*codes, "uncompiled")]
    driver.measure(
        todo,
        lambda m: python(codes[m.program]),
        {"uncompiled": "does not compile: no such header"},
        time.monotonic() + 60,
        results,
        lambda: None,
    )
    assert [m["ok"] for m in results["measurements"]] == [False, False, True, False]
    assert results["figures"] == [{"question": 6, **FIGURE}]
    text = report.render(results)
    for words in ("hangs", "killed at its limit", "boom", "no such header", "4.25"):
        assert words in text


def test_nothing_runs_past_the_budget_of_the_whole():
    results = _empty_results()
    saved = []
    begin = time.monotonic()
    driver.measure(
        [Measurement(6, f"hangs {i}", limit_s=50) for i in range(4)],
        lambda m: python("import time; time.sleep(60)"),
        {},
        begin + driver.LEAST_S + 1,
        results,
        lambda: saved.append(len(results["measurements"])),
    )
    assert time.monotonic() - begin < driver.LEAST_S + 6
    whys = [f["why"] for f in results["failures"]]
    assert whys[0].startswith("killed at its limit of")
    assert whys[1:] == ["not begun: the time for all of them is spent"] * 3
    assert saved == [1, 2, 3, 4]  # each step is on disk before the next


def test_failed_compilation_names_the_program_and_the_error(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\ncase "$*" in *launch.cu*) echo "bad thing" >&2; exit 2;; esac\n')
    nvcc.chmod(0o755)
    broken = runner.build(plan.PROGRAMS, tmp_path / "build", str(nvcc))
    assert broken == {"launch": "does not compile: bad thing"}


def test_compiler_that_hangs_is_given_up(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexec sleep 60\n")
    nvcc.chmod(0o755)
    broken = runner.build(("launch",), tmp_path / "build", str(nvcc), limit_s=1)
    assert broken == {"launch": "did not compile within 1 s"}


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "9"), ("--only", "'9'", "1 to 8")),
        (("--only", "two"), ("--only", "'two'", "1 to 8")),
        (("--budget", "0"), ("--budget", "'0'", "3 to 3600")),
        (("--budget", "nan"), ("--budget", "'nan'", "3 to 3600")),
        (("--report", "no/such/file"), ("--report", "no/such/file")),
        (("--report", "README.md"), ("--report", "README.md")),
        (("--out", "README.md"), ("--out", "README.md", "not a folder")),
        (("--wrong",), ("--wrong",)),
    ],
)
def test_unusable_argument_is_named(arguments, words):
    done = probe("--dry-run", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(w in done.stderr for w in words), done.stderr


def test_only_chosen_questions_run(tmp_path):
    done = probe("--dry-run", "--only", "3,6", "--out", str(tmp_path))
    assert done.returncode == 0
    (file,) = tmp_path.iterdir()
    names = [m["name"] for m in json.loads(file.read_text())["measurements"]]
    assert names == ["active_clusters", "launch", "peers gemm"]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_it_says_so_and_names_the_way_out(tmp_path):
    done = probe("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def _empty_results() -> dict:
    return {
        "schema": 1,
        "dry_run": False,
        "when": "2026-01-01T00:00:00+00:00",
        "machine": {"gpu": "a GPU"},
        "measurements": [],
        "figures": [],
        "failures": [],
    }
