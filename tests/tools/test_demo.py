"""The demo and the command line, as a user meets them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import blocked, command

import rnnfast
from rnnfast.__main__ import DEMO_IMPORTS, main
from rnnfast.gradient_flow.reading import WORST_FIRST

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in DEMO_IMPORTS),
    reason="the extras of the demo are not installed",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two that share a busy machine wait for each other at each of hundreds of time steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_info_needs_torch_alone():
    done = command("info", prelude=blocked(*DEMO_IMPORTS))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"rnnfast {rnnfast.__version__}\n")
    assert "reference: usable" in done.stdout


def test_the_command_says_its_version():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"rnnfast {rnnfast.__version__}\n")


@pytest.mark.parametrize("script", ["rnnfast", "rnnfast.exe", "__main__.py"])
def test_the_usage_names_the_command_that_was_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(Path("folder") / script)])
    with pytest.raises(SystemExit):
        main([])
    name = "python -m rnnfast" if script == "__main__.py" else "rnnfast"
    assert capsys.readouterr().err.startswith(f"usage: {name} [-h] [--version] COMMAND")


def test_info_in_full_has_the_environment_that_torch_collects(monkeypatch, capsys):
    import torch.utils.collect_env as collect_env

    brief = rnnfast.info()
    assert "rnnfast.info(full=True)" in brief.splitlines()[-1]
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "PyTorch version: any")
    assert main(["info", "--full"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:-2] == brief.splitlines()[:-1]
    assert said[-2:] == ["", "PyTorch version: any"]


@pytest.mark.proof
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
        (["demo", "--full", "--quick"], "not allowed with argument"),
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


@pytest.mark.proof
@needs_extras
def test_quick_demo_prints_a_table_and_writes_picture_and_figures(tmp_path: Path):
    folder = tmp_path / "new" / "out"
    done = command("demo", "--quick", "--seed", "3", "--out", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "demo.json").read_text())
    assert result["settings"]["seed"] == 3
    assert result["machine"]["torch"] == torch.__version__
    assert [task["time_steps"] for task in result["tasks"]] == [18, 28, 38]
    said = " ".join(done.stdout.split())
    for task in result["tasks"]:
        plain = task["networks"]["tanh"]
        assert task["speed_up"] == task["ms_of_nn_RNN"] / plain["ms_per_training_step"]
        assert f"{task['speed_up']:.2f}x" in said
        assert task["largest_loss_difference_to_nn_RNN"] < 1e-4
        assert len(task["networks"]) == 6
        for network in task["networks"].values():
            assert len(network["loss"]) == len(network["test_accuracy"]) == task["epochs"] == 2
            assert f"{network['test_accuracy'][-1]:.0%}" in said
            assert network["last_epoch"]["verdict"] in said
            left = network["last_epoch"]["log10_left_by_lag"]
            assert len(left) == task["time_steps"]
            assert left[0] == 0
        assert plain["first_epoch"]["half_life"] < 5
        assert plain["first_epoch"]["horizon"] < 38 or task["time_steps"] < 38


@pytest.mark.proof
@needs_extras
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path):
    from rnnfast import demo

    def losses(seed: int) -> list:
        result = demo.run(tmp_path, epochs=1, seed=seed, quick=True)
        return [n["loss"] for task in result["tasks"] for n in task["networks"].values()]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@needs_extras
def test_half_life_and_horizon_of_an_epoch_are_those_of_its_record():
    """The network forgets by a known factor; the slower of its two layers counts."""
    from rnnfast.demo.results import of_epoch

    rnn = rnnfast.RNN(8, 4, 2, nonlinearity="relu", batch_first=True, track_gradient_flow=True)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            weight.fill_(0.1 if name.startswith("weight_ih") else 1)
        rnn.weight_hh_l0.copy_(torch.eye(4) / 2)
        rnn.weight_hh_l1.copy_(torch.eye(4) * 0.9)
    rnn(torch.ones(2, 90, 8))[1].sum().backward()
    found = of_epoch([rnn.gradient_flow] * 3)
    assert found["half_life"] == pytest.approx(6.5788, rel=1e-3)
    assert found["horizon"] == 66
    assert found["verdict"] == "vanishing"
    left = [10**x for x in found["log10_left_by_lag"][:60]]
    assert left == pytest.approx([0.9**k for k in range(60)], rel=1e-4)


NUDGED = "torch.nn.RNN, nudged"


def with_one_nudged(seed: int, dtype: torch.dtype) -> dict:
    """nn.RNN, rnnfast's twin of it, and an nn.RNN each of whose weights is one unit in the last
    place off: how far nn.RNN gets from itself."""
    from rnnfast.demo.training import PLAIN, TORCH, networks

    models = networks(seed, dtype)
    models = {TORCH: models[TORCH], NUDGED: copy.deepcopy(models[TORCH]), PLAIN: models[PLAIN]}
    with torch.no_grad():
        for weight in models[NUDGED].parameters():
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    return models


@needs_extras
def test_tanh_starts_as_nn_rnn_does():
    from rnnfast.demo.training import PLAIN, TORCH, networks

    made = networks(5)
    assert type(made[PLAIN].rnn) is rnnfast.RNN
    weights = {name: made[name].state_dict() for name in (TORCH, PLAIN)}
    assert list(weights[TORCH]) == list(weights[PLAIN])
    assert all(torch.equal(w, weights[PLAIN][key]) for key, w in weights[TORCH].items())


@needs_extras
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [0, 2])
def test_first_losses_are_those_of_torch(dtype: torch.dtype, index: int):
    """To within rounding, as nn.RNN itself feels it.

    A rounding of the pre-activation is allowed 4 sqrt(H) u (|p| + |h||W|) (rnnfast.testing).
    The nudge adds u to 2u times |W|, all upwards, to the same place at every time step. So
    rnnfast may be off by 4 sqrt(H) of what the nudge does to nn.RNN, plus the roundings of
    the loss itself: a sum over 10 classes and a mean over the batch.
    """
    from rnnfast.demo.tasks import digit_tasks
    from rnnfast.demo.training import (
        BATCH_SIZE,
        HIDDEN_SIZE,
        PLAIN,
        TORCH,
        largest_difference,
        train,
    )

    task = digit_tasks(0, epochs=1, quick=True)[index]
    task = dataclasses.replace(task, inputs=task.inputs.to(dtype))
    curves = train(task, with_one_nudged(0, dtype), seed=0)
    nudged = largest_difference(curves[NUDGED], curves[TORCH])
    fast = largest_difference(curves[PLAIN], curves[TORCH])
    loss = max(curves[TORCH].losses)
    roundings = (BATCH_SIZE + 10) * torch.finfo(dtype).eps / 2 * loss
    assert fast <= 4 * HIDDEN_SIZE**0.5 * nudged + roundings


@needs_extras
@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("lives", [(math.nan, math.nan), (1234.5, math.inf), (1.3, 999999.0)])
@pytest.mark.parametrize("ms", [0.04, 999.97, 12345.6])
def test_the_table_of_the_demo_cuts_no_word_at_80_columns(width, lives, ms):
    from rich.console import Console

    from rnnfast.demo import results
    from rnnfast.demo.training import CURES

    network = {
        "test_accuracy": [1.0],
        "first_epoch": {"half_life": lives[0]},
        "last_epoch": {"half_life": lives[1], "horizon": math.inf},
        "ms_per_training_step": ms,
    }
    words = (*WORST_FIRST, WORST_FIRST[0])
    networks = {n: copy.deepcopy(network) for n in CURES}
    for made, word in zip(networks.values(), words):
        made["last_epoch"]["verdict"] = word
    task = {"delay": 500, "time_steps": 508, "ms_of_nn_RNN": ms, "networks": networks}
    where = {"cpu": "Intel(R) Xeon(R) Platinum 8480CL Processor @ 2.20GHz", "threads": 112}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results.table({"machine": where, "tasks": [task]}))
    said = console.export_text()
    assert "…" not in said
    assert all(len(line) <= width for line in said.splitlines())
    for word in (*CURES, *words[: len(CURES)], "half-life", "horizon", "verdict", "over 507"):
        assert word in said
