"""The demo and the command line, as a user meets them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast.__main__ import DEMO_IMPORTS, main

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in DEMO_IMPORTS),
    reason="the extras of the demo are not installed",
)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two that share a busy machine wait for each other at each of hundreds of time steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments: str, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    """``python -m rnnfast``, after the statements of ``prelude``; a warning is an error."""
    run = f"import runpy, sys; {prelude}; runpy.run_module('rnnfast', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", run, *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def blocked(*names: str) -> str:
    """A prelude under which these cannot be imported: as if nobody had installed them."""
    find = f"lambda self, name, *_: names.block(name) if name in {set(names)} else None"
    block = "lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name, name=name))"
    return (
        f"names = type('Names', (), dict(find_spec={find}, block=staticmethod({block})))(); "
        "sys.meta_path.insert(0, names)"
    )


def test_info_needs_torch_alone():
    done = command("info", prelude=blocked(*DEMO_IMPORTS))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"rnnfast {rnnfast.__version__}\n")
    assert "reference: serves" in done.stdout


@pytest.mark.parametrize("missing", sorted(DEMO_IMPORTS))
def test_a_missing_extra_is_named_in_one_line_with_the_cure(missing: str, tmp_path: Path):
    folder = tmp_path / "out"
    done = command("demo", "--quick", "--out", str(folder), prelude=blocked(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rnnfast: the demo needs {missing}: pip install rnnfast[demo]\n"
    assert not folder.exists()


@needs_extras
def test_another_missing_module_is_not_taken_for_an_extra():
    done = command("demo", "--quick", prelude=blocked("scipy"))
    assert done.returncode == 1
    assert "ModuleNotFoundError: scipy" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required"),
        (["dance"], "invalid choice"),
        (["info", "--epochs", "1"], "unrecognized arguments"),
        (["demo", "--fast"], "unrecognized arguments"),
        (["demo", "--epochs", "0"], "--epochs: given 0, wanted 1 or more"),
        (["demo", "--epochs", "-3"], "--epochs: given -3, wanted 1 or more"),
        (["demo", "--epochs", "many"], "--epochs: given 'many', wanted a whole number"),
        (["demo", "--seed", "-1"], "--seed: given -1, wanted 0 to 2^63 - 1"),
        (["demo", "--seed", str(2**63)], "wanted 0 to 2^63 - 1"),
    ],
)
def test_bad_arguments_end_with_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@needs_extras
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["demo", "--out", str(folder)]) == 2
        assert f"--out: cannot write to {folder}" in capsys.readouterr().err


@needs_extras
def test_quick_demo_prints_a_table_and_writes_picture_and_figures(tmp_path: Path):
    folder = tmp_path / "new" / "out"
    done = command("demo", "--quick", "--seed", "3", "--out", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "demo.json").read_text())
    assert result["settings"]["seed"] == 3
    assert result["machine"]["torch"] == torch.__version__
    assert [task["time_steps"] for task in result["tasks"]] == [64, 250]
    for task in result["tasks"]:
        networks = task["networks"]
        ms = {name: network["ms_per_training_step"] for name, network in networks.items()}
        assert task["speed_up"] == ms["torch.nn.RNN"] / ms["rnnfast.RNN"]
        assert f"{task['speed_up']:.2f}x" in done.stdout
        for name in ("torch.nn.RNN", "rnnfast.RNN"):
            assert len(networks[name]["loss"]) == task["epochs"]
            assert len(networks[name]["test_accuracy"]) == task["epochs"]
            for text in (f"{ms[name]:.2f}", f"{networks[name]['loss'][-1]:.4f}"):
                assert text in done.stdout


@needs_extras
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path):
    from rnnfast import demo

    def losses(seed: int) -> list:
        result = demo.run(tmp_path, epochs=1, seed=seed, quick=True)
        return [n["loss"] for task in result["tasks"] for n in task["networks"].values()]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@needs_extras
def test_networks_start_equal_and_the_nudged_one_a_bit_off():
    from rnnfast.demo.training import NUDGED, RNNFAST, TORCH, contestants

    weights = {n: m.state_dict() for n, m in contestants(5).items()}
    assert type(contestants(5)[RNNFAST].rnn) is rnnfast.RNN
    assert list(weights[TORCH]) == list(weights[RNNFAST])
    for key, weight in weights[TORCH].items():
        assert torch.equal(weight, weights[RNNFAST][key])
        assert not torch.equal(weight, weights[NUDGED][key])
        torch.testing.assert_close(weight, weights[NUDGED][key], rtol=2**-23, atol=0)


@needs_extras
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [0, 1])
def test_first_losses_are_those_of_torch(dtype: torch.dtype, index: int):
    """To within rounding, as nn.RNN itself feels it.

    A rounding of the pre-activation is allowed 4 sqrt(H) u (|p| + |h||W|) (design.md, 6).
    The nudge adds u to 2u times |W|, all upwards, to the same place at every time step. So
    rnnfast may be off by 4 sqrt(H) of what the nudge does to nn.RNN, plus the roundings of
    the loss itself: a sum over 10 classes and a mean over the batch.
    """
    from rnnfast.demo.tasks import digit_tasks
    from rnnfast.demo.training import (
        BATCH_SIZE,
        HIDDEN_SIZE,
        NUDGED,
        RNNFAST,
        TORCH,
        contestants,
        largest_difference,
        train,
    )

    task = digit_tasks(0, quick=True)[index]
    task = dataclasses.replace(task, inputs=task.inputs.to(dtype))
    curves = train(task, contestants(0, dtype), seed=0)
    nudged = largest_difference(curves[NUDGED], curves[TORCH])
    fast = largest_difference(curves[RNNFAST], curves[TORCH])
    loss = max(curves[TORCH].losses)
    roundings = (BATCH_SIZE + 10) * torch.finfo(dtype).eps / 2 * loss
    assert fast <= 4 * HIDDEN_SIZE**0.5 * nudged + roundings
