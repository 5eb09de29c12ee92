"""What only the emulation can run: `make test` starts it with RNNFAST_EMULATION set."""

from __future__ import annotations

import pytest
import torch

from rnnfast.backends import cuda_plan


def pytest_ignore_collect() -> bool | None:
    return None if cuda_plan.EMULATION else True


@pytest.fixture(autouse=True)
def _one_thread(one_torch_thread):
    pass


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
