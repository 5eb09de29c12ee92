"""The files of the benchmark, the providers it refuses, its errors for bad arguments."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import rnnfast.bench.providers as providers
from bench import options
from bench.gpu_probe import canned, plan
from bench.ladder import call_cost, limits
from rnnfast.__main__ import main, parser
from rnnfast.backends import BACKENDS, cpu
from rnnfast.bench import command, compare, floors, points, rows, table, timing
from rnnfast.bench.gate import Gate, shortened
from rnnfast.bench.providers.layer import Layer, saved_bytes
from rnnfast.bench.providers.rnnfast_rnn import RnnfastRNN, problem
from rnnfast.bench.providers.torch_rnn import TorchRNN, algorithm
from rnnfast.bench.workload import BOTH, FORWARD, GRAPH, STEP, Data, Workload

ROOT = Path(__file__).parents[2]
FAST = ["--seconds-per-workload", "0.001", "--threads", "1"]

needs_cpu = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


@pytest.fixture(autouse=True)
def _small_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.GEMM_SIZE, "cpu", 64)


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Wrong(TorchRNN):
    """nn.RNN with one element of one result off."""

    name = "wrong"

    def __init__(self, result: str) -> None:
        self.result = result

    def build(self, work: Workload, data: Data) -> Layer:
        layer = super().build(work, data)
        right = layer.results

        def results() -> dict[str, torch.Tensor]:
            found = right()
            found[self.result].view(-1)[-1] *= 1.001
            return found

        layer.results = results
        return layer


class Raises(TorchRNN):
    name = "odd"

    def build(self, work: Workload, data: Data) -> Layer:
        raise RuntimeError("no such kernel")


class Missing(TorchRNN):
    name = "rare"

    def unavailable(self, work: Workload) -> str:
        return "not installed here"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bench(tmp_path: Path, *arguments: str, of: list | None = None) -> int:
    parsed = parser().parse_args(["bench", *arguments, "--out", str(tmp_path), *FAST])
    return command.run(parsed, providers.PROVIDERS if of is None else of)


@pytest.mark.proof
@needs_cpu
def test_quick_run_writes_a_line_for_each_provider_and_pictures(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "rnnfast", "bench", "--quick", "--out", str(tmp_path), *FAST],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("FAILED")) == (0, 0), done.stderr
    found = read(tmp_path / "cpu.csv")
    assert {"processor", "simd", "python", "torch", "rnnfast", "commit", "date"} <= set(found[0])
    timed = {(row["provider"], row["what"]) for row in found}
    assert {("torch", STEP), ("rnnfast-cpu", STEP), ("loop", BOTH)} <= timed
    assert (("jax", BOTH) in timed) == bool(importlib.util.find_spec("jax"))
    ours = [row for row in found if (row["provider"], row["what"]) == ("rnnfast-cpu", BOTH)]
    assert len(ours) == len(points.quick("cpu"))
    for row in found:
        assert 0 < float(row["p10_s"]) <= float(row["median_s"]) <= float(row["p90_s"])
        assert row["threads"] == "1"
        share = float(row["floor_s"]) / float(row["median_s"])
        assert float(row["floor_share"]) == pytest.approx(share, rel=1e-4)
        assert row["saved_bytes"].isdigit() == (row["provider"] not in UNCOUNTED)
        assert bool(row["target_over_torch"]) == (row in ours and row["norm"] == "")
    for name in ("cpu.png", "cpu-us-per-step.png", "cpu-heat.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "targets reached" in done.stdout
    assert "left out: flashrnn: flashrnn is not installed" in done.stderr


UNCOUNTED = ("jax", "onnxruntime", "openvino")  # nobody knows what they keep
NAMES = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


@pytest.mark.parametrize("result", ["y", "h_n", "dx", *(f"d{name}" for name in NAMES)])
def test_a_wrong_result_gets_no_time_and_exit_status_1(result, tmp_path, capsys):
    assert bench(tmp_path, "--points", "9,3,5", of=[TorchRNN(), Wrong(result)]) == 1
    assert {row["provider"] for row in read(tmp_path / "cpu.csv")} == {"torch"}
    said = capsys.readouterr().err
    assert f"FAILED: wrong at (9, 3, 5): wrong results, so no time. {result}: errs by" in said


@pytest.mark.parametrize("what", ["transposed", "no bias", "a step late", "a row zeroed"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("special", [{}, {"layers": 2, "directions": 2}, {"packed": True}])
def test_the_gate_finds_a_wrong_layer(what, precision, special):
    work = Workload(20, 8, 24, precision=precision, **special)
    gate = Gate(work)
    right = TorchRNN().build(work, gate.data)
    assert gate.complaints(right) == []
    data = gate.data._replace(weights=dict(gate.data.weights))
    if what == "transposed":
        data.weights["weight_hh_l0"] = data.weights["weight_hh_l0"].T
    elif what == "no bias":
        data.weights["bias_hh_l0"] = torch.zeros_like(data.weights["bias_hh_l0"])
    elif what == "a step late":
        data = data._replace(x=data.x.roll(1, 0))
    wrong = TorchRNN().build(work, data)
    if what == "a row zeroed":
        found = wrong.results()
        found["y"][3, 5] = 0
        wrong.results = lambda: found
    assert any(complaint.startswith("y: ") for complaint in gate.complaints(wrong))


def test_the_gate_takes_what_everybody_computes():
    """Nobody is refused for the rounding of the precision."""
    for work in points.quick("cpu"):
        gate = Gate(shortened(work))
        for provider in providers.PROVIDERS:
            slow = provider.name in ("jax", "compiled loop")
            if not slow and not provider.unavailable(work):
                assert gate.complaints(provider.build(shortened(work), gate.data)) == []


def test_a_provider_that_raises_is_named_with_its_reason_and_the_run_goes_on(tmp_path, capsys):
    assert bench(tmp_path, "--points", "2,2,2", "3,1,4", of=[Raises(), TorchRNN()]) == 1
    err = capsys.readouterr().err
    assert "FAILED: odd at (2, 2, 2): no such kernel" in err
    assert "FAILED: odd at (3, 1, 4): no such kernel" in err
    timed = {(row["T"], row["provider"]) for row in read(tmp_path / "cpu.csv")}
    assert timed == {("2", "torch"), ("3", "torch")}


def test_what_fails_while_it_is_timed_is_named_and_the_run_goes_on(tmp_path, capsys):
    class Breaks(TorchRNN):
        name = "breaks"

        def build(self, work: Workload, data: Data) -> Layer:
            layer, called = super().build(work, data), []

            def forward() -> None:
                called.append(work)
                if work.T == 2 and len(called) > 1:
                    raise RuntimeError("the device is lost")

            layer.calls[FORWARD] = forward
            return layer

    assert bench(tmp_path, "--points", "2,2,2", "3,1,4", of=[Breaks(), TorchRNN()]) == 1
    assert "FAILED: (2, 2, 2): the device is lost" in capsys.readouterr().err
    assert {row["T"] for row in read(tmp_path / "cpu.csv")} == {"3"}


def test_a_provider_that_is_not_there_is_left_out_with_its_reason(tmp_path, capsys):
    assert bench(tmp_path, "--points", "2,2,2", of=[Missing(), TorchRNN()]) == 0
    assert "left out: rare: not installed here (first at (2, 2, 2))" in capsys.readouterr().err


def test_every_backend_can_be_timed_by_name(tmp_path, capsys):
    names = ["torch", "rnnfast-torch", "rnnfast-reference"]
    assert bench(tmp_path, "--points", "6,3,5", "--providers", *names) == 0
    found, _ = rows.read_csv(tmp_path / "cpu.csv")
    assert {row.provider for row in found} == set(names)
    assert all(row.target_over_torch is None for row in found)  # they promise nothing
    assert "torch: native" in capsys.readouterr().out


@needs_cpu
def test_layers_of_every_kind_are_measured(tmp_path):
    special = ["--layers", "2", "--bidirectional", "--packed", "--precisions", "float64"]
    assert bench(tmp_path, "--points", "6,3,5", *special) == 0
    found, facts = rows.read_csv(tmp_path / "cpu.csv")
    work = Workload(6, 3, 5, precision="float64", layers=2, directions=2, packed=True)
    assert {row.work for row in found} == {work}
    assert {row.provider for row in found} == {"torch", "rnnfast-cpu"}
    assert facts["torch"] == torch.__version__
    assert {row.estimated_us_per_step for row in found} == {None}  # of kernels on a GPU alone
    norm = ["--points", "6,3,5", "--norm", "layer", "--providers", "rnnfast-cpu", "loop"]
    assert bench(tmp_path, *norm) == 0
    assert {row.provider for row in rows.read_csv(tmp_path / "cpu.csv")[0]} == {
        "rnnfast-cpu",
        "loop",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--points", "1,2"], "--points: given '1,2', wanted T,B,H, each 1 or more"),
        (["--points", "1,0,3"], "--points: given '1,0,3', wanted T,B,H, each 1 or more"),
        (["--points", "1,x,3"], "--points: given '1,x,3', wanted T,B,H, each 1 or more"),
        (["--seconds-per-workload", "0"], "given '0', wanted more than 0"),
        (["--seconds-per-workload", "nan"], "given 'nan', wanted more than 0"),
        (["--threads", "0"], "--threads: given 0, wanted 1 or more"),
        (["--precisions", "int8"], "--precisions: invalid choice: 'int8'"),
        (["--norm", "batch"], "--norm: invalid choice: 'batch'"),
        (["--quick", "--points", "1,1,1"], "--points: not allowed with argument --quick"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_argument_is_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--providers", "cudnn"], "--providers: given 'cudnn', wanted some of ['torch', "),
        (["--out", __file__], "--out: cannot write to"),
        (
            ["--points", "1,1,1", "--precisions", "tf32"],
            "--precisions: tf32 is a precision of GPUs",
        ),
        (["--quick", "--layers", "2"], "--precisions, --layers, ...: they are of --points"),
        (["--quick", "--precisions", "float64"], "--precisions, --layers, ...: they are of"),
        (["--quick", "--probe", "none.json"], "--probe: a CPU's floors are measured in the run"),
        (["--compare", "none.csv", "none.csv"], "--compare: cannot read none.csv"),
        (["--compare", __file__, __file__], "given other columns than `rnnfast bench` writes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(arguments, complaint, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert main(["bench", *arguments, *out]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["bench", "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the clock


def test_a_ratio_is_taken_round_by_round():
    """A machine that is twice as slow in some rounds is so for both."""
    ours, theirs = [1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 6.0, 3.0, 6.0, 3.0]
    assert timing.speed_up(theirs, ours) == (3, 3, 3)


def test_every_candidate_has_a_sample_in_every_round_and_they_take_turns():
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = timing.take_turns(candidates, 0, rounds=4)
    assert len(samples["a"]) == len(samples["b"]) == 3
    turns = "".join(name for name, before in zip(calls, ["", *calls]) if name != before)
    assert turns == "ababab"  # first to see how long they take, then ab, ba, ab


# --------------------------------------------------------------------------- work, floors, targets


def test_work_is_counted():
    work = Workload(10, 3, 4)
    assert work.flops(FORWARD) == 2 * 30 * (4 * 4 + 4 * 4)
    assert work.flops(BOTH) == 3 * work.flops(FORWARD)
    weights = 2 * 4 * 4 + 2 * 4
    assert work.bytes(FORWARD) == 4 * (2 * 120 + weights)
    assert work.bytes(BOTH) == 4 * (6 * 120 + 3 * weights)
    stack = replace(work, layers=2, directions=2, precision="bfloat16")
    assert stack.flops(FORWARD) == 2 * 30 * 8 * (4 + 4) + 2 * 30 * 8 * (8 + 4)
    packed = replace(work, packed=True)
    assert packed.lengths.tolist() == [10, 8, 5]
    assert packed.flops(FORWARD) * 30 == work.flops(FORWARD) * 23


def probe_file(folder: Path, gpu: str = "NVIDIA H200") -> Path:
    figures = [f for m in plan.measurements() for f in canned.figures(m)]
    path = folder / "gpu_probe_nvidia-h200_2026-01-01T0000.json"
    path.write_text(json.dumps({"machine": {"gpu": gpu}, "figures": figures}))
    return path


def test_a_floor_is_the_largest_of_products_memory_and_exchange(tmp_path):
    chip = floors.read_probe(probe_file(tmp_path))
    assert chip == floors.Chip("NVIDIA H200", 4.3e12, 200 / 1980e6)
    gemm = 100e12
    work = Workload(512, 1, 512, precision="bfloat16", device="cuda")
    assert floors.floor(work, FORWARD, gemm, chip) == pytest.approx(512 * 200 / 1980e6)
    assert floors.floor(work, BOTH, gemm, chip) == pytest.approx(2 * 512 * 200 / 1980e6)
    one_block = replace(work, H=256)
    by_memory = one_block.bytes(FORWARD) / 4.3e12
    by_products = one_block.flops(FORWARD) / gemm
    assert floors.floor(one_block, FORWARD, gemm, chip) == max(by_memory, by_products)
    assert floors.floor(work, FORWARD, gemm, None) == work.flops(FORWARD) / gemm
    assert floors.latest_probe(tmp_path, "NVIDIA H200") == chip
    assert floors.latest_probe(tmp_path, "NVIDIA H100") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"machine": {}, "figures": []}'])
def test_a_file_that_is_no_probe_is_refused(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(floors.ProbeError, match="no result of make gpu-probe"):
        floors.read_probe(path)
    with pytest.raises(floors.ProbeError, match="cannot read"):
        floors.read_probe(tmp_path / "none.json")


def test_the_algorithm_that_torch_chooses_is_told(monkeypatch):
    class H200:
        multi_processor_count, major, minor = 132, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: H200)
    work = Workload(512, 16, 512, precision="float16", device="cuda")
    for changes, how in (
        ({}, "cuDNN persistent"),
        ({"B": 256}, "cuDNN standard"),
        ({"B": 96, "H": 896}, "cuDNN standard"),
        ({"B": 12}, "cuDNN standard"),
        ({"H": 520}, "cuDNN standard"),
        ({"precision": "bfloat16"}, "cuDNN standard"),
        ({"layers": 2}, "cuDNN standard"),
        ({"packed": True, "H": 64}, "cuDNN standard"),
        ({"H": 256}, "cuDNN persistent, small H"),
        ({"H": 320}, "cuDNN forward persistent, small H; backward standard"),
        ({"H": 384}, "cuDNN forward persistent, small H; backward persistent"),
        ({"device": "cpu"}, "native"),
    ):
        assert algorithm(replace(work, **changes)) == how
    assert points.target(work, "cuDNN persistent") == 2
    assert points.target(work, "cuDNN standard") == 5


def a_row(**changes) -> rows.Row:
    work = Workload(128, 64, 512, "listed")
    samples = {BOTH: {"torch": [0.22] * 5, "rnnfast-cpu": [0.2] * 5, "jax": [0.26] * 5}}
    layers = {name: Layer({}, dict) for name in samples[BOTH]}
    (row,) = (r for r in rows.rows(work, samples, layers, 300.0, None) if r.ours)
    return replace(row, **changes)


def test_targets_name_what_was_missed():
    lines = table.summary([a_row(floor_share=0.8)], {"rnnfast-cpu": 1.5})
    assert lines[0] == "1 of 4 targets reached"
    assert "  (128, 64, 512) over torch: 1.10x of 1.20x" in lines
    assert "  (128, 64, 512) share of GEMM: 80% of 85%" in lines
    assert "  (128, 64, 512), 1 thread to 2: 1.50x of 1.70x" in lines


def shown(found: list[rows.Row]) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(table.table(found, "a GPU"))
    return capture.get()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forward_on_a_gpu_stands_beside_its_launch_plans_estimate(backend, monkeypatch):
    asked = []
    monkeypatch.setattr(BACKENDS[backend], "estimates", lambda p: asked.append(p) or (0.077, 9.0))
    work, ways = Workload(5, 4, 8, layers=3, device="cuda"), (FORWARD, BOTH, STEP, GRAPH)
    ours = RnnfastRNN(backend)
    layer = replace(ours.build(work, work.data()), saved_bytes=lambda: None)  # none is called
    assert asked == [problem(work)]
    layers = {"torch": Layer({}, dict), ours.name: layer}
    samples = {what: {name: [2e-6] * 3 for name in layers} for what in ways}
    found = rows.rows(work, samples, layers, None, None)
    (timed,) = (row for row in found if row.estimated_us_per_step is not None)
    assert (timed.provider, timed.what) == (ours.name, FORWARD)
    assert timed.estimated_us_per_step == pytest.approx(3 * 0.077)  # a layer after the other
    assert "estimate ┃" in shown(found)
    assert "0.4 │    0.231" in shown(found)
    assert "estimate ┃" not in shown([row for row in found if row is not timed])


def test_nothing_is_estimated_on_a_cpu(monkeypatch):
    """Emulated GPU kernels run there."""
    monkeypatch.setattr(BACKENDS["cuda"], "estimates", lambda p: (0.077, 9.0))
    work = Workload(5, 4, 8)
    for name in BACKENDS:
        assert RnnfastRNN(name).build(work, work.data()).estimated_us_per_step is None


def test_a_backend_is_asked_about_what_the_module_computes():
    for work in [*points.quick("cpu"), Workload(5, 4, 8, directions=2, norm="layer")]:
        x = work.data().x.to(work.dtype)
        assert problem(work) == work.module("reference")._problem(x)


def test_drawn_points_are_the_same_in_every_run():
    assert points.drawn(20) == points.drawn(20)
    assert len(set(points.drawn(20))) == 20


# ----------------------------------------------------------------------------------- two results


def written(folder: Path, name: str, found: list[rows.Row], **facts: str) -> Path:
    machine = {"processor": "P", "simd": "avx2", "commit": name, "date": "2026-01-01"} | facts
    rows.write_csv(found, machine, folder / name)
    return folder / name


def test_a_file_reads_as_it_was_written(tmp_path):
    given = [a_row(estimated_us_per_step=1.25), a_row(over_jax=None, packed=True, gemm_gflops=None)]
    found, machine = rows.read_csv(written(tmp_path, "a.csv", given))
    for a, b in zip(found, given):
        assert a.work == b.work
        assert a == replace(b, **{n: getattr(a, n) for n in FLOATS})
        for n in FLOATS:
            wanted = getattr(b, n)
            assert getattr(a, n) == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5))
    assert machine["processor"] == "P"


FLOATS = [n for n, f in rows.Row.__dataclass_fields__.items() if "float" in f.type]


def without(path: Path, column: str) -> Path:
    lines = [{n: v for n, v in line.items() if n != column} for line in read(path)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_an_older_file_without_estimates_reads_and_compares(tmp_path):
    new = written(tmp_path, "new.csv", [a_row(estimated_us_per_step=1.25)])
    old = without(written(tmp_path, "old.csv", [a_row()]), "estimated_us_per_step")
    (row,), machine = rows.read_csv(old)
    assert row.estimated_us_per_step is None
    assert list(machine) == ["processor", "simd", "commit", "date"]
    assert compare.compare(old, new)[1][-1] == "0 slower, 0 faster, 1 within the noise"
    with pytest.raises(rows.FormatError, match="other columns"):
        rows.read_csv(without(old, "saved_bytes"))


def spread(ratio: float, noise: float = 0.01) -> dict[str, float]:
    ends = {"over_torch_p10": ratio * (1 - noise), "over_torch_p90": ratio * (1 + noise)}
    return {"over_torch": ratio, **ends}


@pytest.mark.parametrize(
    ("new", "status", "said"),
    [
        (spread(1.8), 1, "1 slower, 0 faster, 0 within the noise"),
        (spread(2.2), 0, "0 slower, 1 faster, 0 within the noise"),
        (spread(1.96), 0, "0 slower, 0 faster, 1 within the noise"),  # 2 %
        (spread(1.8, 0.15), 0, "0 slower, 0 faster, 1 within the noise"),
    ],
)
def test_comparing_names_what_got_slower_beyond_the_noise(new, status, said, tmp_path, capsys):
    old_file = written(tmp_path, "old.csv", [a_row(**spread(2.0))])
    new_file = written(tmp_path, "new.csv", [a_row(**new)], processor="another")
    assert main(["bench", "--compare", str(old_file), str(new_file)]) == status
    out = capsys.readouterr().out
    assert said in out
    assert ("0.90x" in out) == (status == 1)


def test_times_are_compared_on_one_machine_alone(tmp_path, capsys):
    alone = {"over_torch": None, "over_torch_p10": None, "over_torch_p90": None}
    was, slow = a_row(**alone), a_row(**alone, median_s=0.3, p10_s=0.3, p90_s=0.3)
    assert [c.slower for c in compare.changes([was], [slow], same_machine=True)] == [True]
    assert compare.changes([was], [slow], same_machine=False) == []
    files = [
        str(written(tmp_path, "a.csv", [was])),
        str(written(tmp_path, "b.csv", [slow], processor="Q")),
    ]
    assert main(["bench", "--compare", *files]) == 2
    assert "have no row that can be compared" in capsys.readouterr().err


# -------------------------------------------------------------------------------- what is kept


def test_saved_memory_counts_what_only_backward_needs():
    class Keeps(nn.Module):
        def forward(self, x):
            y = (x.exp() * 2).sin()  # exp keeps its result, sin its argument; 2 is no tensor
            return y, y

    x = torch.randn(3, 2, 5, requires_grad=True)
    assert saved_bytes(Keeps(), x, []) == 2 * 3 * 2 * 5 * 4


@needs_cpu
def test_rnnfast_keeps_nothing_but_its_output():
    work = Workload(5, 4, 8)
    (ours,) = (p for p in providers.OURS if p.name == "rnnfast-cpu")
    assert ours.build(work, work.data()).saved_bytes() == 0


def test_a_provider_is_one_small_file():
    """CONTRIBUTING promises this to whoever adds one."""
    for path in Path(providers.__file__).parent.glob("*.py"):
        if path.stem not in ("__init__", "layer"):
            assert len(path.read_text().splitlines()) < 80, path.name


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

    monkeypatch.setattr(options.NormedLoop, "forward", without_norm)
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
