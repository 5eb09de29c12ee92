"""What only Triton's interpreter can run: `make test` starts it with TRITON_INTERPRET=1."""

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


@pytest.fixture(autouse=True)
def _masks_are_bool(monkeypatch):
    """As Triton 3.9 and newer want them; the interpreters before take numbers."""
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
