"""How the CUDA kernels are launched, which needs no GPU to be known; and when they are."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import rnnfast
from rnnfast.backends import (
    BACKENDS,
    BackendError,
    Problem,
    cuda_clock,
    cuda_plan,
    passed_over,
    select,
    triton,
)

pytest.importorskip("rnnfast._C")

H100 = cuda_plan.Device("H100", 90, 132, 227 << 10, (66, 32, 15, 7))  # clusters: an estimate
A100 = cuda_plan.Device("A100", 80, 108, 163 << 10)
DEVICES = [
    H100,
    A100,
    cuda_plan.Device("L4", 89, 58, 99 << 10),
    cuda_plan.Device("B200", 100, 148, 227 << 10, (74, 36, 16, 8)),
    cuda_plan.Device("RTX 5090", 120, 170, 99 << 10, (85, 40, 20, 0)),
    cuda_plan.Device("half of a MIG slice", 90, 7, 227 << 10, (3, 1, 0, 0)),
]
IN_BLOCK = {"bfloat16": 256, "float16": 256, "tf32": 128, "exact": 128}
IN_CLUSTER = {"bfloat16": 1280, "float16": 1280, "tf32": 1024, "exact": 768}
SIZES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(list(IN_BLOCK)),
        "units": st.integers(1, 600) | st.sampled_from([1, 16, 32, 33, 128, 129, 256, 257, 4096]),
        "groups": st.integers(1, 64),
        "rows": st.integers(0, 5000),
        "norm": st.booleans(),
    }
)

# ------------------------------------------------------------------------------------------- plans


@settings(max_examples=examples(3000), derandomize=False)
@given(SIZES, st.sampled_from(DEVICES))
def test_every_size_has_a_plan_that_fits(size, device):
    plan = cuda_plan.plan_for(**size, device=device)
    mode, units = size["mode"], size["units"]
    assert not plan.refused
    assert plan.shared <= device.shared_memory
    assert units <= plan.units
    assert plan.cycles > 0
    assert plan.step > 0
    if plan.streaming:
        check_streaming(plan, **size)
        return
    assert plan.workspace == 0
    assert units <= IN_BLOCK[mode] or plan.cluster > 1
    assert plan.threads <= 1024
    # Beside its weights a thread keeps what the kernels need: 255 registers and 65536 a block.
    assert plan.weight_registers <= 144
    assert plan.threads * 255 <= 65536
    rows = plan.slices * plan.columns
    assert rows - plan.columns < size["rows"] <= rows
    assert 1 <= plan.columns <= 8
    assert plan.blocks == max(plan.slices, 1) * size["groups"] * plan.cluster
    # All weights of the padded group are in the registers of the threads, or in shared memory.
    parts = 3 if mode == "exact" else 1
    width = 32 if mode == "tf32" else 16
    held = plan.weight_registers * 32 * plan.threads * plan.cluster
    assert held == plan.units**2 * parts * width or (
        plan.shared_weights and held < plan.units**2 * 48
    )
    if plan.cluster == 1:
        assert "single block" in str(plan)
        return
    assert f"clusters of {plan.cluster}: " in str(plan)
    assert plan.cluster in (2, 4, 8, 16)
    assert device.capability >= 90
    assert device.clusters[(2, 4, 8, 16).index(plan.cluster)] > 0


def check_streaming(plan, mode, units, groups, rows, norm):
    assert str(plan).startswith("streaming: a launch a step, ")
    assert plan.cluster == 1
    assert plan.columns in (8, 16, 32, 64)
    assert plan.slices == -(-rows // 8)
    # Bytes of a tile of W as factors, and of one of the state, twice; of its values and its sums.
    tiles, of_tile = -(-units // 16), {"tf32": 1024, "exact": 1536}.get(mode, 512)
    of_rows = plan.slices * tiles * (of_tile + 512 + 192)
    assert plan.workspace == groups * (tiles**2 * of_tile + of_rows)


@pytest.mark.parametrize("mode", IN_BLOCK)
def test_no_shape_is_refused(mode):
    """Streaming runs sizes that fit nowhere else, and all sizes where it is asked for."""
    for device in DEVICES:
        for units, rows in ((1, 1), (1281, 7), (4096, 256), (20_000, 3)):
            assert not cuda_plan.plan_for(mode, units, 1, rows, False, device).refused
            plan = cuda_plan.plan_for(mode, units, 1, rows, True, device, (-1, 0))
            check_streaming(plan, mode, units, 1, rows, True)
    for rows in (8, 16, 32, 64):
        plan = cuda_plan.plan_for("bfloat16", 100, 2, 5, False, H100, (-1, rows))
        assert (plan.streaming, plan.columns) == (True, rows)
    assert cuda_plan.plan_for("exact", IN_CLUSTER["exact"] + 1, 1, 8, False, H100).streaming
    assert not cuda_plan.plan_for("tf32", IN_CLUSTER["tf32"], 1, 8, False, H100).streaming


@settings(max_examples=examples(300), derandomize=False)
@given(SIZES, st.sampled_from(DEVICES))
def test_more_work_takes_longer(size, device):
    steps = [
        cuda_plan.plan_for(**size | {"rows": rows}, device=device).step for rows in (1, 800, 9000)
    ]
    assert steps[0] <= steps[1] <= steps[2]
    normed = cuda_plan.plan_for(**size | {"norm": True}, device=device)
    assert normed.step >= cuda_plan.plan_for(**size | {"norm": False}, device=device).step


@pytest.mark.parametrize(("mode", "units", "blocks"), [("bfloat16", 300, 8), ("tf32", 200, 4)])
def test_what_is_wanted_is_planned(mode, units, blocks):
    for columns in (1, 5, 8):
        plan = cuda_plan.plan_for(mode, units, 2, 20, False, H100, (blocks, columns))
        assert (plan.cluster, plan.columns) == (blocks, columns)
    refused = cuda_plan.plan_for(mode, units, 2, 20, False, H100, (1, 0)).refused
    words = f"none that can run {units} units a head and 20 rows on H100"
    assert refused == f"RNNFAST_CUDA_KERNEL and RNNFAST_CUDA_COLUMNS name {words}"
    assert cuda_plan.plan_for(mode, units, 2, 20, False, H100, (0, 9)).refused == refused


def test_more_blocks_than_a_grid_has_are_no_plan():
    refused = cuda_plan.plan_for("bfloat16", 256, 65535, 2**31 - 1, False, H100).refused
    assert refused == f"there is no kernel for 256 units a head and {2**31 - 1} rows on H100"
    assert cuda_plan.plan_for("bfloat16", 256, 4, 2**31 - 1, False, H100).blocks == 2**30


def test_fallback_from_large_clusters_to_smaller_ones():
    """Where sixteen blocks do not come together eight do, and so on; then streaming."""
    for sizes, wanted in ((4, 16), (3, 8), (2, 4), (1, 0)):
        clusters = tuple(9 if i < sizes else 0 for i in range(4))
        device = cuda_plan.Device("cut", 90, 64, 227 << 10, clusters)
        plan = cuda_plan.plan_for("bfloat16", 512, 1, 1, False, device)
        assert (0 if plan.streaming else plan.cluster) == wanted
    device = cuda_plan.Device("cut", 90, 64, 227 << 10, (9, 9, 9, 0))
    large = cuda_plan.plan_for("bfloat16", 1024, 1, 8, False, device)
    assert large.cluster == 8
    assert large.shared_weights


@pytest.mark.parametrize(
    ("mode", "units", "threads"),
    [
        ("bfloat16", 1, 64),
        ("bfloat16", 33, 128),
        ("bfloat16", 200, 256),
        ("tf32", 128, 256),
        ("exact", 65, 256),
    ],
)
def test_threads_of_a_block(mode, units, threads):
    assert cuda_plan.plan_for(mode, units, 1, 8, False, A100).threads == threads


def test_plan_refuses_an_old_device():
    old = cuda_plan.Device("T4", 75, 40, 48 << 10)
    assert (
        "compute capability 8.0, and T4 has 7.5"
        in cuda_plan.plan_for("tf32", 8, 1, 1, False, old).refused
    )


# -------------------------------------------------------------------------------------- the choice


def problem(**changes) -> Problem:
    found = Problem("cuda", torch.float32, "rnn_tanh", projected=False, units=128, rows=16)
    return found._replace(**changes)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as a choice looks at it; returned is the way to have another."""

    def have(device: cuda_plan.Device) -> None:
        monkeypatch.setattr(cuda_plan, "device_of", lambda *_: device)
        facts = triton.Device(device.name, divmod(device.capability, 10), device[2], device[3])
        monkeypatch.setattr(triton, "_device", lambda *_: facts)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_plan, "KERNELS", cuda_plan.EXTENSION)
    monkeypatch.setattr(cuda_plan, "EMULATION", "")
    monkeypatch.setattr(cuda_plan, "code_refused", lambda index: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    have(H100)
    return have


def refusal(**changes) -> str:
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call") as error:
        select("cuda", problem(**changes))
    return str(error.value)


def test_gpu_that_can_is_taken(gpu):
    for changes in ({}, {"dtype": torch.bfloat16, "units": 256}, {"cell": "rnn_sigmoid"}):
        assert select("cuda", problem(**changes)) == "cuda"


def test_refusals_name_the_reason(gpu, monkeypatch):
    assert "it has no kernel for torch.float64" in refusal(dtype=torch.float64)
    assert "it computes on an NVIDIA GPU, and the tensors are on cpu" in refusal(device="cpu")
    gpu(cuda_plan.Device("T4", 75, 40, 48 << 10))
    assert "it needs compute capability 8.0, and T4 has 7.5" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert "it computes on an NVIDIA GPU" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "there is no GPU that torch can use" in refusal()
    gpu(H100)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_plan, "code_refused", lambda index: "the driver is too old")
        assert "the driver is too old" in refusal()
        assert select("auto", problem()) != "cuda"
    assert "65536 heads and directions are more than the 65535" in refusal(groups=65536)
    monkeypatch.setattr(cuda_plan, "KERNELS", None)
    assert "the extension was built without it; see rnnfast.info()" in refusal()


@pytest.mark.proof  # it needs triton
def test_auto_on_a_gpu_prefers_what_was_compiled(gpu):
    assert select("auto", problem()) == "cuda"
    large = problem(units=1000, dtype=torch.float16, extras=("norm",))  # torch has none
    assert select("auto", large) == "cuda"
    huge = large._replace(units=4000)  # no room in a cluster
    assert select("auto", huge) == "triton"
    assert "us a step against triton's" in passed_over("cuda", huge)
    assert select("auto", huge._replace(rows=256)) == "cuda"
    assert select("auto", huge._replace(rows=256, extras=())) == "torch"
    gpu(A100)
    assert select("auto", large) == "triton"  # no room in a block, no clusters
    gpu(H100)
    assert select("auto", problem(dtype=torch.float64)) == "torch"
    many = problem(rows=20_000, units=512, dtype=torch.bfloat16)
    assert "us a step against torch's" in passed_over("cuda", many)
    assert select("auto", many._replace(extras=("norm",))) == "cuda"


def test_explain_prints_the_plan(gpu, monkeypatch):
    rnn = rnnfast.RNN(3, 64, bidirectional=True)
    monkeypatch.setattr(type(rnn), "_problem", lambda *_, **__: problem(units=64, groups=2))
    lines = rnnfast.explain(rnn, torch.randn(5, 2, 3)).splitlines()
    assert lines[0].startswith("cuda (auto)")
    assert "single block: 64 units by 8 rows, 4 blocks of 128 threads" in lines[1]


NO_TENSORS = {
    **dict.fromkeys(("p", "w_hh", "gamma", "beta", "h_0", "lengths", "reset")),
    **dict.fromkeys(("y", "h_n", "ahat", "rstd", "workspace")),
    **dict.fromkeys(("steps", "batch", "size", "heads", "groups"), 1),
    **dict.fromkeys(("norm_eps", "device", "stream"), 0),
    "cell": "rnn_tanh",
    "paired": False,
}


def test_without_a_driver_a_call_says_which_kernel_and_why():
    """The extension imports and plans without one; here no machine has it."""
    if torch.cuda.is_available() or not hasattr(cuda_plan.EXTENSION, "cuda_forward"):
        pytest.skip("there is a GPU, or nvcc has not compiled the kernels")
    said = cuda_plan.EXTENSION.cuda_unusable()
    assert said.startswith("the CUDA kernels cannot run: CUDA driver")
    plan = cuda_plan.plan_for("bfloat16", 8, 1, 1, False, H100)
    with pytest.raises(RuntimeError, match=r"kernel forward of bfloat16, of .*: CUDA driver"):
        cuda_plan.EXTENSION.cuda_forward(plan, **NO_TENSORS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gama": None}, r"cuda_forward\(\) has no argument 'gama'"),
        ({"p": 64}, r"wants None or \(address, stride_t, stride_b\) as 'p', and got 64"),
        ({"w_hh": 1.5}, "wants None or an address as 'w_hh', and got 1.5"),
        ({"steps": 1 << 40}, "wants a smaller integer as 'steps'"),
        ({"paired": 1}, "wants True or False as 'paired'"),
    ],
)
def test_a_launch_refuses_what_is_no_argument(given, words):
    if not hasattr(cuda_plan.EXTENSION, "cuda_forward"):
        pytest.skip("nvcc has not compiled the kernels")
    plan = cuda_plan.plan_for("bfloat16", 8, 1, 1, False, H100)
    with pytest.raises(TypeError, match=words):
        cuda_plan.EXTENSION.cuda_forward(plan, **NO_TENSORS | given)
    with pytest.raises(ValueError, match="unknown cell 'tanh'; known: rnn_tanh"):
        cuda_plan.EXTENSION.cuda_forward(plan, **NO_TENSORS | {"cell": "tanh"})
    few = dict(NO_TENSORS)
    del few["h_0"]
    with pytest.raises(TypeError, match=r"cuda_forward\(\) lacks the argument 'h_0'"):
        cuda_plan.EXTENSION.cuda_forward(plan, **few)


def test_auto_passes_on_where_the_driver_is_too_old(monkeypatch):
    """There the extension can be asked for nothing: its runtime refuses every call. Such a device
    has room for no cluster, and no plan is made for it."""
    if torch.cuda.is_available() or not hasattr(cuda_plan.EXTENSION, "cuda_forward"):
        pytest.skip("there is a GPU, or nvcc has not compiled the kernels")
    assert list(cuda_plan.EXTENSION.cuda_clusters("bfloat16", 0)) == [
        0,
        0,
        0,
        0,
    ]  # without a driver
    why = "the CUDA kernels cannot run: CUDA driver version is insufficient"
    asked = []

    def clusters(*_):
        asked.append("clusters")
        raise RuntimeError(why)

    old = SimpleNamespace(
        cuda_unusable=lambda: why, cuda_clusters=clusters, cuda_plan=cuda_plan.EXTENSION.cuda_plan
    )
    facts = SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132,
        shared_memory_per_block_optin=227 << 10,
    )  # fmt: skip
    monkeypatch.setattr(cuda_plan, "KERNELS", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    for cached in (cuda_plan.code_refused, cuda_plan.gpu, cuda_plan.plan_for):
        cached.cache_clear()
    asking = Problem("cuda", torch.bfloat16, "rnn_tanh", True, units=64)
    assert BACKENDS["cuda"].unavailable(asking) == why
    assert not asked
    assert select("auto", asking) in ("triton", "torch", "reference")
    with pytest.raises(BackendError, match="CUDA driver version is insufficient"):
        select("cuda", asking)
    for cached in (cuda_plan.code_refused, cuda_plan.gpu, cuda_plan.plan_for):
        cached.cache_clear()


# ------------------------------------------------------------------------------------------- time


class Gpu:
    """A device with a clock and a queue: the host enqueues, and the device may still be waiting."""

    def __init__(self, host: float) -> None:
        self.host, self.now, self.free = host, 0.0, 0.0  # seconds: of a call of run, both clocks

    def sleep(self, cycles: int) -> None:
        self.free = max(self.free, self.now) + cycles / cuda_clock.CLOCK

    def run(self, seconds: float) -> None:
        self.now += self.host
        self.free = max(self.free, self.now) + seconds

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=None)

        def record() -> None:
            event.at = max(self.free, self.now)

        event.record, event.query = record, lambda: event.at <= self.now
        event.synchronize = lambda: setattr(self, "now", max(self.now, event.at))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.parametrize("host", [1e-5, 1e-3, 5e-3])
def test_time_is_the_device_s_and_not_the_host_s(host, monkeypatch):
    """However long the host takes to enqueue, the device is not idle in between."""
    gpu = Gpu(host)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    device = torch.device("cuda")
    assert cuda_clock.timed(lambda: gpu.run(2e-5), device) == pytest.approx(2e-5)
    (time,) = cuda_clock.slopes(
        [[lambda T=T: gpu.run(3e-6 + T * 5e-7)] for T in cuda_clock.LENGTHS], device
    )
    assert time.step == pytest.approx(5e-7)
    assert time.call == pytest.approx(3e-6)


def test_host_that_never_gets_ahead_ends_the_waiting(monkeypatch):
    gpu = Gpu(10.0)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    runs = []
    cuda_clock.timed(lambda: (runs.append(1), gpu.run(1.0)), torch.device("cuda"))
    assert len(runs) < 10


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("KERNEL", "blok", "given 'blok', wanted one of"),
        ("COLUMNS", "-1", "given '-1', wanted rows"),
    ],
)
def test_names_of_no_plan_are_refused(name, value, words, monkeypatch):
    monkeypatch.setenv(f"RNNFAST_CUDA_{name}", value)
    with pytest.raises(ValueError, match=f"RNNFAST_CUDA_{name}: {words}"):
        cuda_plan._wanted()
    monkeypatch.setenv("RNNFAST_CUDA_KERNEL", "cluster8")
    monkeypatch.setenv("RNNFAST_CUDA_COLUMNS", "5")
    assert cuda_plan._wanted() == (8, 5)


def test_info_names_what_was_compiled(monkeypatch):
    compiled = SimpleNamespace(cuda_archs="sm_80,compute_90", cuda_kernels=lambda: ["a", "b"])
    monkeypatch.setattr(cuda_plan, "KERNELS", compiled)
    assert "CUDA kernels for sm_80, compute_90: a, b" in rnnfast.info()
    monkeypatch.setattr(cuda_plan, "KERNELS", None)
    assert "CUDA kernels: none (" in rnnfast.info()
