"""Which backend serves: a named one or none, "auto" in its order, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import rnnfast
from rnnfast.backends import BACKENDS, BackendError, Problem, cpu, refusals, select

I, H = 3, 4  # noqa: E741
has_extension = pytest.mark.skipif(cpu._C is None, reason="the extension is not built")


def problem(**changes):
    return Problem("cpu", torch.float32, "rnn_tanh", projected=False)._replace(**changes)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "WHY_MISSING", "no compiler was here", raising=False)
    monkeypatch.setattr(rnnfast.report, "BUILD_REPORT", Path("nowhere"))


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that computed something, in order."""
    seen = []

    def watch(name, module, function):
        original = getattr(module, function)

        def watched(*args):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(module, function, watched)

    watch("cpu", BACKENDS["cpu"], "forward")
    watch("torch", BACKENDS["torch"], "layers")
    watch("torch", BACKENDS["torch"], "packed_layers")
    watch("reference", BACKENDS["reference"], "forward")
    return seen


@pytest.mark.proof
@has_extension
def test_the_environment_selects_a_simd_level():
    def run(level: str) -> subprocess.CompletedProcess:
        code = "import rnnfast; print(rnnfast.info())"
        environment = os.environ | {"RNNFAST_SIMD": level}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    for level in cpu._C.simd_levels():
        assert f"with SIMD level {level} of" in run(level).stdout
    refused = run("sse9")
    assert refused.returncode != 0
    usable = ", ".join(cpu._C.simd_levels())
    assert f"RNNFAST_SIMD: SIMD level 'sse9' is not usable here; usable: {usable}" in refused.stderr


def test_order_of_auto():
    assert list(BACKENDS) == ["cpu", "cuda", "triton", "torch", "reference"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({}, "cpu", marks=has_extension),
        pytest.param({"cell": "rnn_sigmoid"}, "cpu", marks=has_extension),
        pytest.param({"projected": True}, "cpu", marks=has_extension),
        pytest.param({"extras": ("residual", "norm")}, "cpu", marks=has_extension),
        pytest.param({"dtype": torch.bfloat16}, "cpu", marks=has_extension),
        ({"dtype": torch.complex64}, "torch"),
        ({"device": "cuda"}, "torch"),  # nobody gets slower by installing this package
        ({"device": "meta"}, "torch"),
        ({"device": "cuda", "cell": "rnn_sigmoid"}, "reference"),
        ({"device": "cuda", "extras": ("norm",)}, "reference"),
        ({"device": "cuda", "projected": True}, "reference"),
    ],
)
def test_auto_takes_the_first_that_serves(changes, wanted):
    assert select("auto", problem(**changes)) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "torch"),
        ({"cell": "rnn_sigmoid"}, "reference"),
        ({"extras": ("reset",)}, "reference"),
        ({"projected": True}, "reference"),
    ],
)
def test_auto_without_the_extension(changes, wanted, no_extension):
    assert select("auto", problem(**changes)) == wanted


def test_the_named_backend_computes(backend, calls):
    rnn = rnnfast.RNN(I, H, backend=backend)
    for input in (torch.randn(5, 2, I), torch.randn(5, I), pack_sequence([torch.randn(5, I)])):
        calls.clear()
        rnn(input)
        assert set(calls) == {backend}


def test_without_the_extension_auto_computes_with_torch(no_extension, calls):
    x = torch.randn(5, 2, I)
    output, _ = rnnfast.RNN(I, H)(x)
    assert output.shape == (5, 2, H)
    assert calls == ["torch"]


REFUSED = {
    "torch, sigmoid": (
        "torch",
        {"nonlinearity": "sigmoid"},
        "torch has no kernel for the cell rnn_sigmoid",
    ),
    "torch, residual": ("torch", {"residual": True, "num_layers": 3}, "kernels have no residual"),
    "cpu, complex": ("cpu", {"dtype": torch.complex64}, "no kernel for torch.complex64"),
    "cpu, elsewhere": ("cpu", {"device": "meta"}, "tensors are on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_named_backend_serves_or_raises(case, calls):
    name, options, text = REFUSED[case]
    rnn = rnnfast.RNN(I, H, backend=name, **options)
    x = torch.zeros(5, 2, I, dtype=options.get("dtype"), device=options.get("device"))
    with pytest.raises(BackendError, match=f"backend '{name}' cannot serve: .*{text}"):
        rnn(x)
    if "device" not in options:
        packed = pack_sequence([x[:, 0]])
        with pytest.raises(BackendError, match=text):
            rnn(packed)
    with pytest.raises(BackendError, match=text):
        rnnfast.explain(rnn, x)
    assert calls == []


def test_backend_error_is_a_runtime_error():
    assert issubclass(rnnfast.BackendError, RuntimeError)
    assert rnnfast.BackendError is BackendError


def test_a_missing_extension_named_says_why(no_extension, calls):
    with pytest.raises(BackendError, match=r"_C is not there .no compiler was here"):
        rnnfast.RNN(I, H, backend="cpu")(torch.zeros(5, 2, I))
    with pytest.raises(BackendError, match="no compiler was here"):
        rnnfast.functional.rnn(torch.zeros(5, 2, H), torch.zeros(H, H), backend="cpu")
    assert calls == []


def test_functional_refuses_torch():
    with pytest.raises(BackendError, match="contain the input projection"):
        rnnfast.functional.rnn(torch.zeros(5, 2, H), torch.zeros(H, H), backend="torch")


@pytest.mark.parametrize("name", ["gpu", "", "Auto", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"backend: given .*, wanted one of \['auto', 'cpu'"):
        select(name, problem())
    with pytest.raises(ValueError, match=r"backend: given .*, wanted one of \['auto', 'cpu'"):
        rnnfast.functional.rnn(torch.zeros(5, 2, H), torch.zeros(H, H), backend=name)


def test_a_backend_changed_at_run_time_is_checked(calls):
    rnn = rnnfast.RNN(I, H)
    with pytest.raises(ValueError, match="backend: given 'gpu'"):
        rnn.backend = "gpu"
    rnn.backend = "reference"
    rnn(torch.zeros(5, 2, I))
    assert calls == ["reference"]


# explain() and info()


@has_extension
def test_explain_on_auto():
    rnn = rnnfast.RNN(I, H)
    assert rnnfast.explain(rnn, torch.zeros(5, 2, I)).splitlines() == [
        "cpu (auto), for tanh in torch.float32 on cpu",
        "  not cuda: it computes on an NVIDIA GPU, and the tensors are on cpu",
        "  not triton: it computes on an NVIDIA GPU, and the tensors are on cpu",
        "  not torch: cpu comes first",
        "  not reference: cpu comes first",
        "  second derivatives, forward mode and torch.func transforms: the eager formula, "
        "whatever the backend",
    ]


def test_explain_says_why_each_other_refused():
    rnn = rnnfast.RNN(I, H, nonlinearity="sigmoid", backend="reference", dtype=torch.complex64)
    lines = rnnfast.explain(rnn, torch.zeros(5, 2, I, dtype=torch.complex64)).splitlines()
    assert lines[0] == "reference (asked for by name), for sigmoid in torch.complex64 on cpu"
    assert "  not cpu: it has no kernel for torch.complex64" in lines
    assert "  not torch: torch has no kernel for the cell rnn_sigmoid" in lines


@has_extension
def test_explain_names_no_order_where_a_backend_is_asked_for():
    lines = rnnfast.explain(rnnfast.RNN(I, H, backend="torch"), torch.zeros(5, 2, I)).splitlines()
    assert "  not cpu: torch is asked for" in lines
    assert "  not reference: torch is asked for" in lines


def test_explain_without_the_extension(no_extension):
    said = rnnfast.explain(rnnfast.RNN(I, H), torch.zeros(5, 2, I))
    assert said.startswith("torch (auto)")
    assert "not cpu: the extension rnnfast._C is not there (no compiler was here)" in said


def test_explain_sees_autocast_and_packed_data():
    rnn = rnnfast.RNN(I, H)
    packed = pack_sequence([torch.zeros(5, I), torch.zeros(3, I)])
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16" in rnnfast.explain(rnn, packed).splitlines()[0]
    assert "torch.float32" in rnnfast.explain(rnn, packed).splitlines()[0]


def test_explain_names_what_forward_takes(calls):
    residual = {"residual": True, "num_layers": 3}
    for options in ({}, {"nonlinearity": "sigmoid"}, residual, {"dtype": torch.float64}):
        rnn = rnnfast.RNN(I, H, **options)
        x = torch.zeros(5, 2, I, dtype=rnn.weight_hh_l0.dtype)
        calls.clear()
        rnn(x)
        assert calls == [rnnfast.explain(rnn, x).split()[0]] * rnn.num_layers


@has_extension
def test_info_with_the_extension():
    said = rnnfast.info()
    assert f"rnnfast {rnnfast.__version__}" in said
    assert torch.__version__ in said
    assert f"extension: rnnfast._C with SIMD level {cpu._C.simd_level()}" in said
    for name in ("cpu", "torch", "reference"):
        assert f"  {name}: usable" in said
    assert "  triton: it computes on an NVIDIA GPU, and the tensors are on cpu" in said


def test_info_without_the_extension_says_what_is_missing_and_what_it_costs(no_extension):
    said = rnnfast.info()
    assert "extension: missing (no compiler was here: these sources were never built)" in said
    assert "slower" in said
    assert "Once the reason is mended, reinstall rnnfast" in said
    assert "  cpu: the extension rnnfast._C is not there" in said
    assert "  torch: usable" in said


def test_info_repeats_what_the_build_said(no_extension, monkeypatch, tmp_path):
    build = tmp_path / "_build.json"
    monkeypatch.setattr(rnnfast.report, "BUILD_REPORT", build)
    never = "extension: missing (no compiler was here: these sources were never built)"
    assert never in rnnfast.info()
    build.write_text('{"extension": false, "reason": "pybind11 is not installed"}')
    assert "extension: missing (pybind11 is not installed)" in rnnfast.info()


def test_refusals_agree_with_select():
    for changes in ({}, {"extras": ("norm",)}, {"dtype": torch.complex64}, {"device": "cuda"}):
        for name, why in refusals(problem(**changes)).items():
            if why:
                with pytest.raises(BackendError):
                    select(name, problem(**changes))
            else:
                assert select(name, problem(**changes)) == name
