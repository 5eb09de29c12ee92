"""The kinds of modules that the tests of this folder run over."""

from __future__ import annotations

import pytest

KINDS = ["RNN", "LSTM", "GRU"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a module's class, in torch.nn and in rnnfast."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves gated modules on torch's kernels and on the reference to `make prove`: `make test` has
    the RNN on each backend, and each kind on the native kernels."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        backend = given.get("backend", given.get("own_backend", "cpu"))
        if given.get("kind", "RNN") != "RNN" and backend != "cpu":
            item.add_marker(pytest.mark.proof)
