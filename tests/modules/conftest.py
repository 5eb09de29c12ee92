"""The kinds of modules that the tests of this folder run over."""

from __future__ import annotations

import pytest

from rnnfast.backends import cuda, triton

KINDS = ["RNN", "LSTM", "GRU"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a module's class, in torch.nn and in rnnfast."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out kinds that a backend has no kernel for. `make prove` alone runs gated modules on
    torch's kernels and on the reference: `make test` has the RNN on each backend, and each kind on
    the native kernels."""
    kernels = {"cuda": cuda.KERNELS_OF, "triton": triton.KERNELS_OF}
    kept = []
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        backend = given.get("backend", given.get("own_backend", "cpu"))
        gated = given.get("kind") in KINDS[1:]
        if gated and backend in kernels and given["kind"].lower() not in kernels[backend]:
            continue
        if gated and backend != "cpu":
            item.add_marker(pytest.mark.proof)
        kept.append(item)
    items[:] = kept
