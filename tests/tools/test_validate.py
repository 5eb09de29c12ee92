"""``python -m rnnfast validate``: what it writes, and that it finds what is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import needs_cpu
from commands import blocked, command

import rnnfast
from rnnfast.__main__ import VALIDATE_IMPORTS, main
from rnnfast.backends import BACKENDS, cpu, reference
from rnnfast.cells import CELLS
from rnnfast.recurrence import loop, precision

if any(importlib.util.find_spec(name) is None for name in VALIDATE_IMPORTS):
    pytest.skip("the extras of validate are not installed", allow_module_level=True)

from rnnfast.validate import command as validation
from rnnfast.validate import large, memory, plan
from rnnfast.validate.kernels import OF_TORCH, Where
from rnnfast.validate.rows import Row

ONE, POOLED = [(6, 3, 8)], [(6, 64, 16)]
TINY = plan.Size(ONE, ONE, POOLED, POOLED, (12, 32, 16), long=(50, 3, 8))
ALL_GROUPS = [name for name in plan.GROUP_NAMES if name != plan.LARGE]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys) -> Callable[..., SimpleNamespace]:
    """The command on few and small cases: its status, what it said, and validate.json."""
    monkeypatch.setitem(plan.SIZES, "quick", TINY)
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken

    def call(*arguments: str, groups: list[str] | None = None) -> SimpleNamespace:
        with monkeypatch.context() as patch:
            patch.setattr(validation, "run", partial(validation.run, groups=groups))
            status = main(["validate", "--quick", "--out", str(tmp_path), *arguments])
        written = tmp_path / "validate.json"
        result = json.loads(written.read_text()) if written.exists() else None
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err, result=result)

    return call


def on_cpu(
    run: Callable, *groups: str, dtype: str = "float32", cell: str = "RNN"
) -> SimpleNamespace:
    return run("--backend", "cpu", "--cell", cell, "--dtype", dtype, groups=list(groups))


# ------------------------------------------------------------------------------ what it writes


@pytest.mark.proof
@needs_cpu
def test_a_run_prints_a_table_and_writes_picture_and_figures(run, tmp_path):
    done = run("--backend", "cpu", "--dtype", "float32", "bfloat16", groups=ALL_GROUPS)
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "validate.png").read_bytes().startswith(b"\x89PNG")
    result = done.result
    assert result["passed"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == torch.get_num_threads()
    rows = {(r["cell"], r["dtype"], r["norm"], r["group"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * (2 * 9 + 3 + 2 * (9 + 2))
    for row in rows.values():
        assert row["result"] == "pass", row
        assert row["cases"] > 0
        assert row["complaints"] == []
    row = rows["RNN", "float32", "layer", "all together"]
    assert row["cases"] == 4 * 3  # nonlinearities; steps, sequences, the record
    for kind in ("steps", "record"):
        assert 0 < row[kind]["ratio"] <= 1
    assert len(row["steps"]["index"]) in (1, 2, 3)
    assert len(row["record"]["index"]) == 3
    assert row["record"]["name"].startswith("record.")
    assert 0 < row["record_relative_error"] <= 1e-5
    sequence = row["sequence"]
    assert sequence["ratio"] == sequence["ours"]["rms"] / sequence["theirs"]["rms"] <= 1.25
    assert sequence["peer"] == "the eager loop"
    assert rows["RNN", "float32", "none", "plain"]["sequence"]["peer"] == "nn.RNN"
    assert rows["RNN", "bfloat16", "none", "plain"]["record_relative_error"] is None
    for cell in ("RNN", "LSTM", "GRU"):
        curves = rows[cell, "bfloat16", "none", "2000 steps"]["curves"]
        both = ["ours", "theirs"]
        assert {name: sorted(of) for name, of in curves.items()} == {"y": both, "dx": both}
        assert len(curves["y"]["ours"]) == TINY.curves[0]
        sequence = rows[cell, "bfloat16", "none", "layouts"]["sequence"]
        assert sequence["ratio"] <= 1.25
        assert sequence["peer"] == f"nn.{cell}"
    said = done.out.strip().splitlines()
    assert said[-2] == f"cpu: every budget is kept, in 86 rows of {sum_of_cases(result)} cases."
    assert sum(
        "clip_state_grad" in line and line.endswith("pass") for line in map(str.rstrip, said)
    )


def sum_of_cases(result: dict) -> int:
    return sum(row["cases"] for row in result["rows"])


def test_a_run_leaves_torch_as_it_was(run):
    run("--backend", "reference", "--dtype", "float32", groups=["plain"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_reference_is_validated_when_asked_for(run):
    done = run("--backend", "reference", groups=["plain", "all together", "module"])
    assert done.status == 0, done.out
    assert len(done.result["rows"]) == 4 * (5 + 2 + 2)


def test_torch_is_validated_where_it_can_run(run):
    done = run("--backend", "torch", "--dtype", "float32", "float16")
    assert done.status == 0, done.out
    groups = {row["group"] for row in done.result["rows"]}
    assert groups == {*OF_TORCH, plan.LONG, plan.LAYER, plan.CHANGED, plan.LAYOUT}
    for name in ("rnn_sigmoid", "rnn_softplus"):
        assert f"torch has no kernel for the cell {name}" in done.out


@pytest.mark.proof
@needs_cpu
def test_a_new_backend_is_judged_as_it_is(run, monkeypatch):
    names = ("unavailable", "forward", "backward")
    module = SimpleNamespace(**{name: getattr(cpu, name) for name in names})
    monkeypatch.setitem(BACKENDS, "mine", module)
    groups = ["plain", "module", plan.LAYOUT]
    assert run("--backend", "mine", groups=groups).status == 0
    module.forward = step_zeroed(module.forward)
    done = run("--backend", "mine", "--dtype", "float32", groups=groups)
    assert done.status == 1
    assert "mine, float32, RNN, plain: y: " in done.out


# ------------------------------------------------------------------------------ planted faults


KEPT, RECORD = 1, 2  # among the inputs of backward


def step_zeroed(right: Callable) -> Callable:
    """y of one time step of one sample."""

    def forward(*inputs):
        found = right(*inputs)
        found.y[len(found.y) // 2, 0] = 0
        return found

    return forward


def dp_step_zeroed(right: Callable) -> Callable:
    def backward(*inputs):
        found = right(*inputs)
        found.x[len(found.x) // 2, 0] = 0
        return found

    return backward


def weights_transposed(right: Callable) -> Callable:
    def forward(x, weights, *others):
        gates = weights.w_hh.unflatten(0, (-1, weights.w_hh.shape[1]))
        return right(x, weights._replace(w_hh=gates.mT.flatten(0, 1)), *others)

    return forward


def bias_dropped(right: Callable) -> Callable:
    def forward(x, weights, *others):
        b_ih, b_hh = (b if b is None else b * 0 for b in (weights.b_ih, weights.b_hh))
        return right(x, weights._replace(b_ih=b_ih, b_hh=b_hh), *others)

    return forward


def bias_gradient_dropped(right: Callable) -> Callable:
    def backward(*inputs):
        found = right(*inputs)
        db = found.weights.b_ih
        weights = found.weights._replace(b_ih=db if db is None else db * 0)
        return found._replace(weights=weights)

    return backward


def weights_packed_once(right: Callable) -> Callable:
    """A cache that asks where the weights lie in memory, not whether they have changed."""
    packed = {}

    def forward(x, weights, *others):
        w_hh = weights.w_hh
        found = packed.setdefault((w_hh.data_ptr(), w_hh.shape, w_hh.dtype), w_hh.clone())
        packs = weights.w_ih is not None
        return right(x, weights._replace(w_hh=found) if packs else weights, *others)

    return forward


def record_one_step_off(right: Callable) -> Callable:
    def backward(*inputs):
        found, record = right(*inputs), inputs[RECORD]
        if record is not None:
            record.copy_(record.roll(1, 1))
        return found

    return backward


def variance_unbiased(right: Callable) -> Callable:
    def layer_norm(a, eps):
        variance, mean = torch.var_mean(a, -1, keepdim=True)
        rstd = (variance + eps).rsqrt()
        return (a - mean) * rstd, rstd

    def forward(*inputs):
        if inputs[1].gamma is None:
            return right(*inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "layer_norm", layer_norm)
            return reference.forward(*inputs)

    return forward


FAULTS = {  # (what of the backend, the fault, the row, the results that are named)
    "a step zeroed": ("forward", step_zeroed, "plain", ["y"]),
    "a step of dp zeroed": ("backward", dp_step_zeroed, "plain", ["dp"]),
    "W_hh transposed": ("forward", weights_transposed, "plain", ["y"]),
    "a bias dropped": ("forward", bias_dropped, "module", ["y"]),
    "a bias without gradient": ("backward", bias_gradient_dropped, "module", ["db_ih"]),
    "weights packed once": ("forward", weights_packed_once, "changed weights", ["y"]),
    "the record one step off": (
        "backward",
        record_one_step_off,
        "plain",
        ["record.state_norm", "record.gain"],
    ),
    "an unbiased variance": ("forward", variance_unbiased, "plain", ["y", "ahat", "rstd"]),
}


@needs_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(run, monkeypatch, fault, cell, dtype):
    what, plant, group, names = FAULTS[fault]
    if cell != "RNN" and (group == "module" or "variance" in fault):
        pytest.skip("the row and layer norm are for the RNN only")
    monkeypatch.setattr(cpu, what, plant(getattr(cpu, what)))
    done = on_cpu(run, group, dtype=dtype, cell=cell)
    assert done.status == 1
    complaints = [c for row in done.result["rows"] for c in row["complaints"]]
    for name in names:
        assert any(c.startswith(f"{name}: ") for c in complaints), complaints
    norm = ", layer norm" if "variance" in fault else ""
    assert f"cpu, {dtype}, {cell}{norm}, {group}: {complaints[0]}" in done.out
    assert done.out.strip().splitlines()[-2].startswith("cpu: a budget is broken in ")


@needs_cpu
def test_weights_that_the_module_keeps_are_found(run, monkeypatch):
    """A cache above the backend, which no change of a parameter reaches."""
    right, kept = rnnfast.RNN._layer_weights, {}

    def layer_weights(self, index):
        fresh = right(self, index)
        values = kept.setdefault(self, [x.detach().clone() for x in fresh])
        return [x + (value - x).detach() for x, value in zip(fresh, values)]

    monkeypatch.setattr(rnnfast.RNN, "_layer_weights", layer_weights)
    done = on_cpu(run, plan.CHANGED)
    assert done.status == 1
    for how in ("in place", "through .data", "by new parameters"):
        assert any(how in text for text in done.result["rows"][0]["complaints"])
    assert "more, in validate.json" in done.out


@needs_cpu
def test_the_record_over_a_sequence_is_compared_too(run, monkeypatch):
    """What is off by 1e-4 is within the budget of a step in 16 bits, not in float32."""
    right = cpu.backward

    def backward(*inputs):
        found = right(*inputs)
        if inputs[RECORD] is not None and not inputs[-1].per_sample:
            inputs[RECORD].mul_(1.0001)
        return found

    monkeypatch.setattr(cpu, "backward", backward)
    done = on_cpu(run, "plain")
    assert done.status == 1
    assert "relative error 0.0001, wanted 1e-05" in done.out


@needs_cpu
def test_two_runs_that_differ_in_a_bit_are_found(run, monkeypatch):
    right, calls = cpu.forward, []

    def forward(*inputs):
        found = right(*inputs)
        calls.append(found)
        found.y[0, 0, 0] += len(calls) % 2 * 1e-7
        return found

    monkeypatch.setattr(cpu, "forward", forward)
    done = on_cpu(run, "plain")
    assert done.status == 1
    assert "y: two runs with the same inputs give different bits (tanh, T = 6, B = 3" in done.out


@needs_cpu
def test_an_element_that_nobody_writes_is_found(run, monkeypatch):
    right = cpu.forward

    def forward(*inputs):
        found = right(*inputs)
        fresh = torch.empty_like(found.y)
        fresh[1:] = found.y[1:]
        return found._replace(y=fresh)

    monkeypatch.setattr(cpu, "forward", forward)
    done = on_cpu(run, "plain")
    assert done.status == 1
    assert "y: inf of its error budget at [0, 0, 0]: nan, wanted " in done.out


# ------------------------------------------------------------------------- what cannot be done


@needs_cpu
def test_a_backend_that_raises_fails_its_row_and_the_run_goes_on(run, monkeypatch):
    right = cpu.backward

    def backward(*inputs):
        if inputs[KEPT].rows.reset is not None:
            raise RuntimeError("no such\nthing")
        return right(*inputs)

    monkeypatch.setattr(cpu, "backward", backward)
    done = on_cpu(run, "reset", "num_heads")
    assert done.status == 1
    words = [(row["group"], row["result"]) for row in done.result["rows"]]
    assert words == [("reset", "FAILED"), ("num_heads", "pass")] * 2
    assert (
        "cpu, float32, RNN, reset: it raised RuntimeError: no such thing (tanh, T = 6" in done.out
    )


def test_a_backend_that_cannot_serve_is_left_out_with_the_reason(run, monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "WHY_MISSING", "nobody built it", raising=False)
    done = run("--dtype", "float32", groups=["plain"])
    assert done.status == 0
    assert {row["backend"] for row in done.result["rows"]} == {"torch"}
    why = "the extension rnnfast._C is not there (nobody built it); see rnnfast.info()"
    assert done.result["left_out"]["cpu"] == why
    assert f"left out: cpu: {why}\n" in done.out
    assert "left out: reference: it is the judge" in done.out
    done = run("--backend", "cpu", "--dtype", "float32")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"rnnfast: --backend: cpu cannot run float32 on cpu: {why}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "abacus"], "invalid choice: 'abacus'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--full"], "not allowed with argument"),
        (["--seed", "1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_end_with_status_2(run, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "int8"], "--dtype: given int8, wanted of those on cpu: float32, float64"),
        (["--device", "cpu", "--dtype", "tf32"], "--dtype: given tf32, wanted of those on cpu"),
        (["--device", "cuda"], "--device: given cuda, and torch finds no CUDA device here"),
    ],
)
def test_what_is_not_there_ends_with_status_2(run, monkeypatch, arguments, complaint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(*arguments)
    assert (done.status, done.out, done.result) == (2, "", None)
    assert complaint in done.err


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["validate", "--out", str(tmp_path / "file")]) == 2
    assert f"--out: cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.proof
@pytest.mark.parametrize("missing", sorted(VALIDATE_IMPORTS))
def test_a_missing_extra_is_named_in_one_line_with_the_cure(missing, tmp_path):
    folder = tmp_path / "out"
    done = command("validate", "--out", str(folder), prelude=blocked(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rnnfast: validate needs {missing}: pip install rnnfast[cli,plots]\n"
    assert not folder.exists()


def test_float32_on_a_gpu_is_judged_by_how_its_products_round():
    """Both the cudnn and the matmul switches count, and are as they were afterwards."""
    names = [a.name for a in validation._arithmetics([], "cuda")]
    assert names == ["float32", "tf32", "float64", "bfloat16", "float16"]
    cudnn = torch.backends.cudnn
    switches = cudnn.rnn, cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for name, wanted, u in (("float32", "ieee", {}), ("tf32", "tf32", {"u_operand": 2.0**-11})):
        arithmetic = plan.ARITHMETICS[name]
        assert arithmetic.rounding("cuda") == u
        with precision.tf32(arithmetic.tf32):
            assert [switch.fp32_precision for switch in switches] == [wanted] * 3
        assert [switch.fp32_precision for switch in switches] == before


# --------------------------------------------------------------------------------- 2^31 elements


def of_large(monkeypatch, free: float = 1e12, cell: str = "tanh") -> Row:
    monkeypatch.setattr(large, "B", 4096)
    monkeypatch.setattr(large, "T", 5)
    monkeypatch.setattr(large, "free_memory", lambda device: free)
    row = Row("cpu", "bfloat16", "none", plan.LARGE)
    large.check_large(row, Where("cpu", plan.ARITHMETICS["bfloat16"], "cpu", 1, (cell,)))
    return row


@needs_cpu
def test_sampled_rows_of_a_large_batch_are_judged(monkeypatch):
    assert plan.LARGE not in [t.row.group for t in large_tasks("default")]
    assert plan.LARGE in [t.row.group for t in large_tasks("full")]
    for cell in ("tanh", "lstm", "gru"):
        row = of_large(monkeypatch, cell=cell)
        assert (row.word, row.cases, row.complaints) == ("pass", 1, [])
    right = cpu.forward

    def forward(*inputs):
        found = right(*inputs)
        found.y[:, -1] = found.y[:, 0]  # as an offset that has overflowed would
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "forward", forward)
        assert any(c.startswith("y: ") for c in of_large(monkeypatch).complaints)

    def backward(*inputs):
        found = whole(*inputs)
        found.x[:, 1] = 1
        return found

    whole = cpu.backward
    monkeypatch.setattr(cpu, "backward", backward)
    (complaint,) = of_large(monkeypatch).complaints
    assert complaint.startswith("dp: not 0 in rows that have no gradient")


def large_tasks(size: str) -> list[plan.Task]:
    of = plan.ARITHMETICS["bfloat16"], "cpu", plan.SIZES[size], None
    return list(plan.tasks("cpu", *of))


@needs_cpu
def test_what_has_no_room_is_left_out_with_the_figures(monkeypatch):
    row = of_large(monkeypatch, free=1e6)
    assert (row.word, row.cases) == ("left out", 0)
    assert row.left_out == "needs 0 GB, 0 GB are free"
    monkeypatch.undo()
    assert large.T * large.B * large.H > 2**31
    assert 18e9 < large.bytes_needed(CELLS["rnn_tanh"], large.B, torch.bfloat16) < 22e9


def test_free_memory_heeds_what_a_container_may_have(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    free = memory.free_memory("cpu")
    assert free > 1e8
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory("cpu") > 1e8
    (tmp_path / "memory.max").write_text("4000\n")
    assert memory.free_memory("cpu") == 3000
