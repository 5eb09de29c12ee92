"""What every test shares: the backends there are, a known seed, and what `make test` leaves out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from cases import MODULE_BACKENDS
from hypothesis import settings

from rnnfast.backends import BACKENDS, Problem, cpu, cuda_plan, triton
from rnnfast.recurrence import precision

# Examples in percent of what a test names (cases.examples): `make test`, by hand, `make prove`.
for name, percent in {"small": 25, "usual": 100, "long": 400}.items():
    settings.register_profile(name, max_examples=percent, deadline=None, derandomize=True)
settings.load_profile("usual")
PROOF = Path(__file__).with_name("proof")


@pytest.fixture(params=MODULE_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves a plain rnnfast.RNN on the CPU."""
    return request.param


@pytest.fixture(params=[p for p in MODULE_BACKENDS if p.values != ("torch",)])
def own_backend(request: pytest.FixtureRequest) -> str:
    """Those of them that also do what nn.RNN cannot: sigmoid, residual, functional.rnn."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of proof/ are marked so; a backend gets no dtype that it lacks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for item in items.copy():
        if item.path.is_relative_to(PROOF):
            item.add_marker(pytest.mark.proof)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        backend, dtype = given.get("backend", given.get("own_backend")), given.get("dtype")
        if backend in BACKENDS and isinstance(dtype, torch.dtype):
            problem = Problem(device, dtype, "rnn_tanh", projected=False)
            if BACKENDS[backend].unavailable(problem).endswith(str(dtype)):
                items.remove(item)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _torch_switches_stay():
    """torch.export raises where cuDNN's switches differ, which one test must not do to another."""
    cudnn = torch.backends.cudnn
    switches = cudnn.rnn, cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before):
        if switch.fp32_precision != value:
            switch.fp32_precision = value


@pytest.fixture(autouse=True)
def _no_tf32():
    """Where a backend follows torch's switch: on a GPU, and what stands in for one."""
    follows = triton.INTERPRETED or cuda_plan.EMULATION or torch.cuda.is_available()
    with precision.tf32(False) if follows else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _masks_are_bool(monkeypatch):
    """As Triton 3.9 and newer want them; the interpreters before take numbers."""
    if not triton.INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    for name, place in (
        ("create_masked_load", 1),
        ("create_masked_store", 2),
        ("create_atomic_rmw", 3),
    ):
        original = getattr(builder, name)

        def access(*given, original=original, name=name, place=place):
            found = given[place].data.dtype
            assert found.kind == "b", f"{name}: given a mask of {found}, wanted bool"
            return original(*given)

        monkeypatch.setattr(builder, name, access)


@pytest.fixture
def outputs_start_as_nan():
    """torch fills what it allocates: an element that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_torch_thread():
    """For tests of many small tensors, where torch's threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cores_enough():
    """The CPU kernels take as many threads as torch has, whatever this machine is."""
    if cpu._C is not None:
        cpu._C.set_cores(64)
    yield
    if cpu._C is not None:
        cpu._C.set_cores(0)
