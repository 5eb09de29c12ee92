"""The drivers of gpu-check and gpu-profile, without a GPU: steps, limits, summary, arguments."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rnnfast.__main__ as command_line
from bench import gpu
from bench.gpu_check import __main__ as checking
from bench.gpu_check import driver, profile, summary, workload
from bench.gpu_check.driver import Step

NINE_MINUTES = 540
PATH = re.compile(r"(^|[\s'\"(=])/\w+/")  # of this machine


def step(name: str, code: str, limit_s: float = 20, **options) -> Step:
    return Step(name, ("python", "-c", code), limit_s, **options)


def run_all(steps: list[Step], folder: Path, seconds: float = 60) -> list[dict]:
    results: list[dict] = []
    driver.run_all(steps, folder, time.monotonic() + seconds, results, lambda: None)
    return results


def command(module: str, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-W", "error", "-m", module, *arguments]
    return subprocess.run(words, cwd=gpu.ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module", params=["bench.gpu_check", "bench.gpu_check.profile"])
def dry_run(request, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("dry") / "made" / "by it"
    done = command(request.param, "--dry-run", "--out", str(out))
    (folder,) = out.iterdir()
    return done, folder


# ---------------------------------------------------------------------------------- the dry run


def test_dry_run_goes_through_all_that_a_step_may_do(dry_run):
    done, folder = dry_run
    assert done.returncode == 1, done.stderr
    results = json.loads((folder / "summary.json").read_text())
    assert results["dry_run"] is True
    assert {s["name"]: s["state"] for s in results["steps"]} == {
        "hangs": "timed out",
        "succeeds": "ok",
        "fails": "failed",
        "crashes": "failed",
        "floods": "ok",
        "writes": "ok",
        "forbidden": "skipped",
        "missing": "skipped",
    }
    said = {s["name"]: s["said"] for s in results["steps"]}
    assert said["hangs"] == "killed at its limit of 3 s; last: last test begun"
    assert said["fails"] == "1 failed, 3 passed in 0.1 s"
    assert said["crashes"].startswith("ended by SIGABRT")
    assert said["forbidden"] == "no permission"
    assert said["missing"] == "no program no-such-program here"


def test_dry_run_cannot_pass_for_a_check(dry_run):
    done, folder = dry_run
    assert re.fullmatch(r"gpu-(check|profile)-dry-run-\d{4}-\d\d-\d\dT\d{4}", folder.name)
    assert "nothing was tested" in done.stdout


def test_summary_fits_on_a_screen_and_holds_no_path(dry_run):
    done, folder = dry_run
    text = (folder / "summary.txt").read_text()
    assert done.stdout == text
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "FAILED tests/gpu/test_x.py::test_y - AssertionError: os.py" in text
    for content in (text, (folder / "summary.json").read_text()):
        assert not PATH.search(content)
        assert "\x1b" not in content


def test_what_is_kept_is_small(dry_run):
    _, folder = dry_run
    assert (folder / "small.csv").exists()
    assert not (folder / "large.ncu-rep").exists()
    assert "removed: large.ncu-rep had 6 MB" in (folder / "summary.txt").read_text()
    log = (folder / "floods.log").read_text()
    assert len(log) < 210_000
    assert log.endswith("line 99998\nline 99999\n")
    assert log.startswith("[")


# ------------------------------------------------------------------------------------- the steps


def test_children_of_a_hanging_step_end_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    (found,) = run_all([step("hangs", code, 3)], tmp_path, 3.5)
    assert found["state"] == "timed out"
    assert time.monotonic() - begin < 10
    time.sleep(2)
    assert not mark.exists()


def test_child_that_outlives_its_step_ends_too(tmp_path):
    """It holds the step's output, which would never end."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    begin = time.monotonic()
    (found,) = run_all([step("leaves one", code)], tmp_path)
    assert found["state"] == "ok"
    assert time.monotonic() - begin < 5
    assert _ends(int(found["said"]))


def _ends(pid: int) -> bool:
    """Within some seconds; one that waits to be reaped has."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_steps_after_a_failed_one_still_run(tmp_path):
    steps = [step("build", "raise SystemExit('no compiler')"), step("tests", "print('fine')")]
    found = run_all(steps, tmp_path)
    assert [s["state"] for s in found] == ["failed", "ok"]
    assert found[0]["said"] == "no compiler"
    assert (tmp_path / "build.log").read_text() == "no compiler\n"


def test_nothing_runs_past_the_budget(tmp_path):
    begin = time.monotonic()
    steps = [step(f"hangs {i}", "import time; time.sleep(60)", 50) for i in range(3)]
    found = run_all(steps, tmp_path, gpu.LEAST_S + 1)
    assert time.monotonic() - begin < gpu.LEAST_S + 6
    assert [s["state"] for s in found] == ["timed out", "not begun", "not begun"]
    assert found[1]["said"] == "the time for all of them is spent"


def test_step_takes_what_those_before_left_and_no_more(tmp_path, monkeypatch):
    limits = []

    def run(words, limit_s, **options):
        limits.append(round(limit_s))
        return gpu.Ended("done\n")

    monkeypatch.setattr(driver.gpu, "run", run)
    run_all([step("a", "", 10), step("b", "", 20), step("c", "", 30)], tmp_path, 70)
    assert limits == [20, 40, 70]  # none of them took any time


def test_result_is_on_disk_before_the_next_step(tmp_path):
    seen, results = [], []
    steps = [step(f"s{i}", "print('x')") for i in range(3)]
    deadline = time.monotonic() + 60
    driver.run_all(steps, tmp_path, deadline, results, lambda: seen.append(len(results)))
    assert seen == [1, 2, 3]


def test_steps_see_this_checkout_and_write_to_the_folder(tmp_path):
    code = "import rnnfast, sys, os; print(rnnfast.__file__, sys.argv[1], os.environ['MARK'])"
    one = Step("where", ("python", "-c", code, "{out}/x"), 30, {"MARK": "set"})
    run_all([one], tmp_path)
    log = (tmp_path / "where.log").read_text()
    assert log == "./rnnfast/__init__.py ./x set\n"


def render(steps: list[dict], **more) -> list[str]:
    results = {
        "title": "GPU check",
        "dry_run": False,
        "when": "2026-01-01T00:00:00+00:00",
        "machine": {"gpu": "a GPU", "torch": "2", **more},
        "seconds": 1.0,
        "steps": steps,
    }
    return summary.render(results).splitlines()


def result(name: str, state: str = "ok", details: int = 0) -> dict:
    lines = [f"FAILED test_{name}_{i} " + "x" * 200 for i in range(details)]
    return {"name": name, "state": state, "seconds": 1.0, "said": "y" * 300, "details": lines}


@pytest.mark.parametrize("count", [1, 12, 60])
@pytest.mark.parametrize("details", [0, 1, 7, 500])
def test_summary_has_room_for_every_failure(count, details):
    steps = [result(f"s{i:02}", "failed" if i % 6 == 0 else "ok") for i in range(count)]
    for one in steps[::6]:
        one |= result(one["name"], "failed", details)
    lines = render(steps, facts="word " * 200)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for one in steps[::6]:
        assert re.search(f"^{one['name']} +failed", text, re.MULTILINE)
        assert not details or f"FAILED test_{one['name']}_0" in text or "more in" in text
    bad = len(steps[::6])
    assert lines[-1].startswith(f"{count - bad} of {count} steps did not fail")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "no output"),
        ("a\nb\n\n", "b"),
        ("10%\r20%\r100% done", "100% done"),
        ("\x1b[1m== 2 passed in 1 s ==\x1b[0m\n", "2 passed in 1 s"),
        ("open /home/someone/x.py failed", "open x.py failed"),
        ("12 img/s, forward/backward", "12 img/s, forward/backward"),
        ("tests/gpu/test_x.py::test_y", "tests/gpu/test_x.py::test_y"),
    ],
)
def test_last_word_of_an_output(output, said):
    assert summary.telling(output)[0] == said


def test_exit_status_is_that_of_the_worst(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, budget=60, dry_run=True)
    good = [step("a", "print(1)"), Step("b", ("no-such-program",), 5)]
    assert driver.check("GPU check", good, args) == 0
    bad = [*good, step("c", "raise SystemExit(3)")]
    assert driver.check("GPU check", bad, args) == 1
    assert "2 of 3 steps did not fail" in capsys.readouterr().out


# ------------------------------------------------------------------------------ the real tables


def test_limits_end_within_nine_minutes():
    for steps, budget in (
        (checking.steps(), checking.BUDGET_S),
        (profile.steps(list(workload.workloads())), profile.BUDGET_S),
    ):
        assert all(s.limit_s >= 10 for s in steps)
        assert sum(s.limit_s for s in steps) <= budget < NINE_MINUTES
        names = [s.name for s in steps]
        assert len(set(names)) == len(names)


def test_build_is_the_one_of_make_extension():
    """It asks no index: setup.py compiles with what is there."""
    (build,) = (s for s in checking.steps() if s.name == "build")
    makefile = (gpu.ROOT / "Makefile").read_text()
    recipe, _, _ = makefile.split("\nextension:")[1].partition("\n\n")
    assert recipe.replace("$(BIN)/", "").endswith("\t" + " ".join(build.command))
    assert build.env == {
        "RNNFAST_REQUIRE_EXTENSION": "1",
        "RNNFAST_CUDA": "1",
        "RNNFAST_CUDA_ARCHS": "native",  # here, where no nvidia-smi names one
    }


def test_build_is_for_the_architecture_of_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "first_line", lambda command: "9.0")
    (build,) = (s for s in checking.steps() if s.name == "build")
    assert build.env["RNNFAST_CUDA_ARCHS"] == "sm_90"


def test_every_file_of_gpu_tests_is_a_step():
    words = [word for s in checking.steps() for word in s.command]
    named = {word for word in words if word.startswith("tests/")}
    files = (gpu.ROOT / "tests" / "gpu").glob("test_*.py")
    assert named == {str(f.relative_to(gpu.ROOT)) for f in files}


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")
def test_gpu_tests_do_not_pass_on_a_cpu_where_a_gpu_is_wanted(tmp_path):
    """As where torch is one without CUDA."""
    steps = [s for s in checking.steps() if s.name == "test_numbers"]
    (found,) = run_all(steps, tmp_path)
    assert found["state"] == "failed"
    assert "torch finds no GPU" in (tmp_path / "test_numbers.log").read_text()


WITHOUT_KERNELS = """
import torch
from rnnfast.backends import cuda_plan
torch.cuda.is_available, cuda_plan.KERNELS = (lambda: True), None
"""


def test_gpu_tests_do_not_pass_without_a_cuda_kernel(tmp_path):
    """As where nvcc was missing: the tests would take Triton's kernels, or cuDNN's."""
    (tmp_path / "without_kernels.py").write_text(WITHOUT_KERNELS)
    command = [sys.executable, "-m", "pytest", "-p", "without_kernels", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": f"{gpu.ROOT}:{tmp_path}", "RNNFAST_REQUIRE_GPU": "1"}
    done = subprocess.run(
        [*command, "--collect-only", "-q", "tests/gpu/test_gpu_kernels.py"],
        cwd=gpu.ROOT,
        env=env | {"RNNFAST_EMULATION": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "wanted the CUDA kernels, and the extension was built without it" in said


@pytest.mark.parametrize("name", ["info", "validate", "bench"])
def test_command_line_takes_the_arguments_of_a_step(name):
    (one,) = (s for s in checking.steps() if s.name == name)
    words = one.words("python", "some/folder")
    assert words[:3] == ["python", "-m", "rnnfast"]
    parsed = command_line.parser().parse_args(words[3:])
    if name != "info":
        assert parsed.quick
        assert parsed.device == "cuda"
        assert parsed.out == Path("some/folder")


def test_modules_of_all_steps_are_there():
    known = list(workload.workloads())
    for one in (*checking.steps(), *profile.steps(known)):
        if "-m" in one.command:
            module = one.command[one.command.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None
    assert not any("{out}" in w for s in profile.steps(known) for w in s.words("python", "x"))


def test_profiler_gets_every_workload_once_with_each_tool():
    steps = profile.steps(["torch-plain", "reference-norm"], "rnn")
    assert len(steps) == 2 * 5
    for one in steps:
        words = one.words("python", "results")
        at = words.index("python")
        assert words[at:-1] == ["python", "-m", "bench.gpu_check.workload"]
        assert one.name.startswith(words[-1])
        tool = words[0] if words[0] == "ncu" else words[words.index("--tool") + 1]
        assert one.name == f"{words[-1]}-{tool}"
        assert words[words.index("--kernel-name") + 1].endswith("rnn")
    assert sum(s.excuse[0] == "ERR_NVGPUCTRPERM" for s in steps) == 2


@pytest.mark.parametrize("name", ["torch-plain", "reference-norm"])
def test_workload_runs(name):
    done = command("bench.gpu_check.workload", name, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name}: forward and backward done\n"


def test_makefile_runs_both_with_the_python_that_was_named():
    makefile = (gpu.ROOT / "Makefile").read_text()
    for target, module in (
        ("gpu-check", "bench.gpu_check"),
        ("gpu-profile", "bench.gpu_check.profile"),
    ):
        recipe = makefile.split(f"\n{target}:")[1].splitlines()[1]
        assert recipe.strip().startswith(f"$(PYTHON) -m {module} --out $(RESULTS)")
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", target, "PYTHON=py", "RESULTS=r", "KERNELS=rnn"],
            cwd=gpu.ROOT,
            capture_output=True,
            text=True,
        )
        words = shlex.split(done.stdout)
        assert words[:5] == ["py", "-m", module, "--out", "r"]
        assert words[5:] == (["--kernels", "rnn"] if target == "gpu-profile" else [])


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("bench.gpu_check", ("--budget", "0"), ("--budget", "'0'", "3 to 3600")),
        ("bench.gpu_check", ("--budget", "soon"), ("--budget", "'soon'", "3 to 3600")),
        ("bench.gpu_check", ("--out", "README.md"), ("--out", "README.md", "not a folder")),
        ("bench.gpu_check", ("--wrong",), ("--wrong",)),
        ("bench.gpu_check.profile", ("--kernels", "a b"), ("--kernels", "'a b'", "letters")),
        (
            "bench.gpu_check.profile",
            ("--workloads", "torch-plain,none"),
            ("--workloads", "'torch-plain,none'", "reference-norm"),
        ),
    ],
)
def test_unusable_argument_is_named(module, arguments, words):
    done = command(module, "--dry-run", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")
@pytest.mark.parametrize("module", ["bench.gpu_check", "bench.gpu_check.profile"])
def test_without_a_gpu_it_says_so_and_names_the_way_out(module, tmp_path):
    done = command(module, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()
