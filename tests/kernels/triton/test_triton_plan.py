"""How Triton's kernels are launched, which needs no GPU to be known; and when they are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rnnfast.triton_kernels.plan import Device, Size, blocks, choose

import rnnfast
from rnnfast.backends import BackendError, Problem, cuda_plan, passed_over, select, triton

H100 = Device("H100", (9, 0), 132, 227 << 10)
DEVICES = [
    H100,
    Device("A100", (8, 0), 108, 163 << 10),
    Device("L4", (8, 9), 58, 99 << 10),
    Device("B200", (10, 0), 148, 227 << 10),
    Device("half of a MIG slice", (9, 0), 7, 99 << 10),
]
SIZES = st.builds(
    Size,
    units=st.integers(1, 9000) | st.sampled_from([1, 16, 17, 128, 129, 256, 257, 1024, 4096]),
    groups=st.integers(1, 32),
    rows=st.integers(1, 3000),
    precision=st.sampled_from(["half", "tf32", "tf32x3"]),
    norm=st.booleans(),
)

# ------------------------------------------------------------------------------------------- plans


@settings(max_examples=examples(1500), derandomize=False)
@given(SIZES, st.sampled_from(DEVICES))
def test_every_size_has_a_plan_that_fits_or_a_reason(size, device):
    plan = choose(size, device)
    if isinstance(plan, str):
        assert device.name in plan
        assert size.units > 128  # only what is large for so small a device
        return
    assert plan.shared <= device.shared_memory
    assert plan.block_units * plan.programs >= size.units
    assert plan.block_rows * plan.slices >= size.rows
    assert plan.block_rows * (plan.slices - 1) < size.rows
    assert plan.step > 0
    if plan.kernel == "resident":
        assert plan.programs == 1
        assert plan.teams == size.groups * plan.slices
    else:  # all programs are on the device at once: they wait for one another
        assert plan.programs * plan.teams <= device.multiprocessors
        assert plan.teams <= size.groups * plan.slices
    assert plan.kernel in str(plan)


@settings(max_examples=examples(100), derandomize=False)
@given(SIZES, st.sampled_from(DEVICES))
def test_batch_size_alone_leads_to_two_kernels_at_most(size, device):
    compiled = set()
    for rows in [*range(1, 70), *range(70, 6000, 97)]:
        plan = choose(size._replace(rows=rows), device)
        if not isinstance(plan, str):
            compiled.add((plan[:4], plan.programs, plan.warps, plan.kept))
    assert len(compiled) <= 2


@pytest.mark.parametrize(
    ("units", "precision", "kernel"),
    [
        (1, "half", "resident"),
        (256, "half", "resident"),
        (257, "half", "tiled"),
        (128, "tf32", "resident"),
        (129, "tf32", "tiled"),
        (128, "tf32x3", "resident"),
        (4096, "tf32x3", "tiled"),
    ],
)
def test_one_program_keeps_what_fits(units, precision, kernel):
    assert choose(Size(units, 1, 16, precision), H100).kernel == kernel


@pytest.mark.parametrize(
    ("units", "precision", "kept"),
    [
        (64, "tf32x3", True),
        (129, "tf32x3", False),
        (256, "tf32", True),
        (257, "tf32", False),
        (512, "half", True),
        (513, "half", False),
    ],
)
@pytest.mark.parametrize("device", DEVICES[:4])
def test_weights_are_kept_where_they_fit(units, precision, kept, device):
    plan = choose(Size(units, 1, 8, precision), device)
    assert plan.kept == (kept and not (precision == "tf32" and device.capability < (9, 0)))
    where = "kept by the program" if plan.kept else "from the L2 cache at each step"
    assert f"weights {where}" in str(plan)


def test_weights_come_from_the_cache_where_many_rows_take_turns():
    many = choose(Size(512, 1, 4096, "half"), H100)
    assert not many.kept
    assert many.block_rows > choose(Size(512, 1, 8, "half"), H100).block_rows


def test_weights_beyond_the_shared_memory_are_shared_by_a_team():
    small = Device("L4", (8, 9), 58, 99 << 10)
    assert choose(Size(256, 1, 16, "half"), small).kernel == "tiled"
    assert choose(Size(128, 1, 16, "half"), small).kernel == "resident"


def test_small_batches_waste_least():
    few = choose(Size(128, 1, 8, "half"), H100)
    assert (few.block_rows, few.slices) == (8, 1)
    assert choose(Size(128, 1, 5000, "half"), H100).block_rows == 16


def test_more_work_than_multiprocessors_takes_turns():
    one, many = (choose(Size(1024, 1, rows, "half"), H100) for rows in (16, 4096))
    assert many.step > 4 * one.step
    assert blocks(many.slices, many.teams) > 1


@pytest.mark.parametrize(
    ("dtype", "units", "wide"),
    [
        (torch.float32, 5, 8),
        (torch.float16, 5, 8),
        (torch.bfloat16, 12, 16),
        (torch.float32, 12, 12),
    ],
)
def test_rows_of_the_weights_begin_at_16_bytes(dtype, units, wide):
    D, heads = 2, 3
    w_hh = torch.randn(D, heads * units, units).to(dtype)
    found = triton._padded(w_hh)
    assert found.shape == (D * heads, wide, wide)
    assert torch.equal(found[:, :units, :units], w_hh.view(-1, units, units))
    assert not found[:, units:].any()
    assert not found[..., units:].any()
    assert (found.data_ptr() == w_hh.data_ptr()) == (units == wide)  # no copy that is not needed


def test_first_row_of_the_weights_does_too():
    w_hh = torch.randn(65)[1:].view(8, 8)
    found = triton._padded(w_hh)
    assert torch.equal(found, w_hh[None])
    assert found.data_ptr() % 16 == 0


# -------------------------------------------------------------------------------------- the choice


def problem(**changes) -> Problem:
    found = Problem("cuda", torch.float32, "rnn_tanh", projected=False, units=128, rows=16)
    return found._replace(**changes)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as a choice looks at it; returned is the way to have another."""

    def have(device: Device) -> None:
        monkeypatch.setattr(triton, "_device", lambda *_: device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_plan, "KERNELS", None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    have(H100)
    return have


def refusal(**changes) -> str:
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call") as error:
        select("triton", problem(**changes))
    return str(error.value)


@pytest.mark.proof  # it needs triton
def test_gpu_that_can_is_taken(gpu):
    for changes in ({}, {"dtype": torch.bfloat16}, {"cell": "rnn_sigmoid", "units": 3000}):
        assert select("triton", problem(**changes)) == "triton"


@pytest.mark.proof  # it needs triton
def test_refusals_name_the_reason(gpu, monkeypatch):
    assert "it has no kernel for torch.float64" in refusal(dtype=torch.float64)
    assert "it computes on an NVIDIA GPU, and the tensors are on cpu" in refusal(device="cpu")
    gpu(Device("T4", (7, 5), 40, 64 << 10))
    assert "it needs compute capability 8.0, and T4 has 7.5" in refusal()
    gpu(Device("a slice", (8, 0), 2, 8 << 10))
    wanted = "128 units a head need more than the 2 multiprocessors and 8 KiB of shared memory"
    assert f"{wanted} a block of a slice" in refusal()
    gpu(H100)
    assert "1073741824 rows of the batch are more than the 1073741823" in refusal(rows=2**30)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
        triton._without_triton.cache_clear()
        assert "it needs triton 3.6, and 3.5.1 is installed" in refusal()
        patch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
        patch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="2.4.0"))
        for interpreted, refused in ((True, True), (False, False)):
            patch.setattr(triton, "INTERPRETED", interpreted)
            triton._without_triton.cache_clear()
            assert ("a NumPy below 2.4, and 2.4.0 is" in triton._without_triton()) == refused
        patch.setitem(sys.modules, "triton", SimpleNamespace())
        triton._without_triton.cache_clear()
        assert "triton is not installed (pip install 'rnnfast[triton]')" in refusal()
    triton._without_triton.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert "it computes on an NVIDIA GPU" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU that torch can use" in refusal()


def test_named_backend_refuses_before_anything_runs(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    rnn = rnnfast.RNN(3, 4, backend="triton")
    with pytest.raises(BackendError, match="it computes on an NVIDIA GPU, and the tensors are on"):
        rnn(torch.randn(5, 2, 3))


@pytest.mark.proof  # it needs triton
def test_auto_on_a_gpu_takes_what_is_estimated_to_be_faster(gpu):
    assert select("auto", problem()) == "triton"
    large = problem(units=2048, rows=4096, dtype=torch.bfloat16)
    assert select("auto", large) == "torch"
    assert "us a step against torch's" in passed_over("triton", large)
    assert select("auto", large._replace(extras=("norm",))) == "triton"  # torch has none
    assert select("auto", problem(dtype=torch.float64)) == "torch"


@pytest.mark.proof  # it needs triton
def test_explain_prints_the_plan(gpu, monkeypatch):
    rnn = rnnfast.RNN(3, 64, bidirectional=True)
    monkeypatch.setattr(type(rnn), "_problem", lambda *_, **__: problem(units=64, groups=2))
    lines = rnnfast.explain(rnn, torch.randn(5, 2, 3)).splitlines()
    assert lines[0].startswith("triton (auto)")
    assert "resident: 64 units by 8 rows a program, 4 programs, each alone" in lines[1]
    rnn = rnnfast.RNN(3, 64, backend="triton")
    large = problem(units=2048, rows=4096, dtype=torch.bfloat16)
    monkeypatch.setattr(type(rnn), "_problem", lambda *_, **__: large)
    lines = rnnfast.explain(rnn, torch.randn(5, 2, 3)).splitlines()
    assert lines[0].startswith("triton (asked for by name)")
    assert "  not torch: triton is asked for" in lines
