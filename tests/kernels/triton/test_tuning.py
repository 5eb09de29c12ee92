"""Plans chosen by the clock, and the file that keeps them."""

from __future__ import annotations

import json

import pytest
import torch

from rnnfast import tuning
from rnnfast.backends import cuda_clock, cuda_plan

SECONDS = {(1, 8, 64): 3.0, (4, 8, 256): 1.0, (-1, 16, 16): 2.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path / "made"))
    return tmp_path / "made"


class Clock:
    def __init__(self) -> None:
        self.asked = []

    def __call__(self, choice: tuple[int, ...]) -> float:
        self.asked.append(choice)
        return SECONDS[choice]


def test_fastest_is_taken_and_kept(cache):
    clock = Clock()
    tuned = tuning.Tuned("NVIDIA H200 (a)", "build 1")
    assert tuned.best("a size", list(SECONDS), clock) == (4, 8, 256)
    assert clock.asked == list(SECONDS)
    (file,) = cache.iterdir()
    assert file.name == "NVIDIA-H200-a-.json"
    again = tuning.Tuned("NVIDIA H200 (a)", "build 1")
    assert again.best("a size", list(SECONDS), clock) == (4, 8, 256)
    assert len(clock.asked) == 3  # nothing more
    assert again.best("another", [(1, 8, 64)], clock) == (1, 8, 64)
    # A third process reads the plans of the first two.
    other = tuned.best("a third", [(-1, 16, 16)], clock)
    assert other == (-1, 16, 16)
    assert set(json.loads(file.read_text())["plans"]) == {"a size", "another", "a third"}


def test_choice_that_is_no_longer_there_is_measured_anew():
    clock = Clock()
    tuning.Tuned("gpu", "build").best("size", list(SECONDS), clock)
    fewer = [(1, 8, 64), (-1, 16, 16)]
    assert tuning.Tuned("gpu", "build").best("size", fewer, clock) == (-1, 16, 16)


def test_another_build_measures_anew():
    clock = Clock()
    tuning.Tuned("gpu", "build 1").best("size", list(SECONDS), clock)
    tuning.Tuned("gpu", "build 2").best("size", list(SECONDS), clock)
    assert len(clock.asked) == 6


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"build": "build"}', '{"build": "build", "plans": 3}']
)
def test_file_that_cannot_be_read_is_told_of_and_replaced(text, cache):
    cache.mkdir()
    file = cache / "gpu.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"RNNFAST_AUTOTUNE: .*gpu\.json cannot be read"):
        tuned = tuning.Tuned("gpu", "build")
    file.unlink()
    assert tuned.best("size", list(SECONDS), Clock()) == (4, 8, 256)
    assert json.loads(file.read_text())["plans"] == {"size": "(4, 8, 256)"}


def test_folder_that_cannot_be_written_is_told_of(cache):
    cache.write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be read"):
        tuned = tuning.Tuned("gpu", "build")
    with pytest.warns(UserWarning, match="cannot be"):
        assert tuned.best("size", list(SECONDS), Clock()) == (4, 8, 256)


def test_where_results_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("RNNFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "rnnfast"


def test_capture_refuses_what_it_cannot_time(monkeypatch):
    pytest.importorskip("rnnfast._C")
    monkeypatch.setattr(cuda_plan, "KERNELS", cuda_plan.EXTENSION)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    like = type("Tensor", (), {"is_cuda": True})()
    device = cuda_plan.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))
    with pytest.raises(
        RuntimeError, match="RNNFAST_AUTOTUNE: the first call of a size cannot be in"
    ):
        cuda_clock.tuned(
            ("bfloat16", 256, 1, 8, False), device, like, lambda *_: pytest.fail("it timed")
        )


def test_plans_that_are_tried():
    """The fastest first, each under a name that gives it back."""
    pytest.importorskip("rnnfast._C")
    device = cuda_plan.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))
    size = "bfloat16", 512, 1, 64, True
    plans = cuda_plan.EXTENSION.cuda_plans(*size, *device)
    assert [p.step for p in plans] == sorted(p.step for p in plans)
    assert plans[0].wanted == cuda_plan.plan_for(*size, device).wanted
    assert {p.wanted[0] for p in plans} == {4, 8, 16, -1}
    assert len({p.wanted for p in plans}) == len(plans)
    for plan in plans:
        assert str(cuda_plan.plan_for(*size, device, plan.wanted)) == str(plan)
