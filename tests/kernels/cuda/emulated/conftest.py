"""What only the emulation can run: `make prove` starts it with RNNFAST_EMULATION set."""

from __future__ import annotations

import pytest

from rnnfast.backends import cuda_plan


def pytest_ignore_collect() -> bool | None:
    return None if cuda_plan.EMULATION else True


@pytest.fixture(autouse=True)
def _one_thread(one_torch_thread):
    pass


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(outputs_start_as_nan):
    pass
