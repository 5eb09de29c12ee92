"""What only Triton's interpreter can run: `make prove` starts it with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest

from rnnfast.backends import triton


def pytest_ignore_collect() -> bool | None:
    return None if triton.INTERPRETED else True


@pytest.fixture(autouse=True)
def _one_thread(one_torch_thread):
    pass


@pytest.fixture(autouse=True)
def _plans_anew():
    """Tests change what plans rest on."""
    from rnnfast.triton_kernels import plan

    plan.choose.cache_clear()
    yield
    plan.choose.cache_clear()
