"""On a machine with a GPU these tests run there; elsewhere the same bodies run on the CPU."""

from __future__ import annotations

import contextlib
import os
import warnings

import pytest
import torch

from rnnfast.backends import BACKENDS, Problem

# Without it cuDNN and cuBLAS need not give the same bits twice. CUDA reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = Problem(DEVICE, torch.float32, "rnn_tanh", projected=False)
if os.environ.get("RNNFAST_REQUIRE_GPU", "0") not in ("", "0"):
    why = "torch finds no GPU" if DEVICE == "cpu" else BACKENDS["cuda"].unavailable(PLAIN)
    if why:
        raise pytest.UsageError(f"RNNFAST_REQUIRE_GPU: wanted the CUDA kernels, and {why}")
USABLE = [name for name, backend in BACKENDS.items() if not backend.unavailable(PLAIN)]


@contextlib.contextmanager
def _silence():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run a plain rnnfast.RNN here."""
    return request.param


@pytest.fixture(params=[name for name in USABLE if name != "torch"])
def own_backend(request: pytest.FixtureRequest) -> str:
    """The backends that also have the options that nn.RNN lacks."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _cuda_started() -> None:
    """cuBLAS warns where its first call is one of autograd's thread."""
    if DEVICE == "cuda":
        with _silence():
            x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
            (x @ x).sum().backward()


@pytest.fixture
def exact(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype whose rounding leaves least room for another computation."""
    used = [n for n in ("backend", "own_backend") if n in request.fixturenames]
    wide = PLAIN._replace(dtype=torch.float64)
    all_serve = not any(BACKENDS[request.getfixturevalue(n)].unavailable(wide) for n in used)
    return torch.float64 if all_serve else torch.float32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``@pytest.mark.gpu(n)``: what has a meaning with n GPUs alone."""
    for item in items:
        for mark in item.iter_markers("gpu"):
            (wanted,) = mark.args
            if torch.cuda.device_count() < wanted:
                item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPU(s)"))
